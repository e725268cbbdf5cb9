"""The executor interface: the only place where time passes. Swap it and the same brain serves real tokens,
drives many devices, or runs a day of traffic in a second of virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from foretell.core.messages import Batch, Result
from foretell.core.params import SamplingParams
from foretell.core.request import Request


class Executor(Protocol):
    """``depth``: batches in flight. ``chain``: sampled tokens of one request that may be outstanding when its
    next token is submitted. ``num_blocks``: KV blocks of each KV group, the executor's own answer to how much
    fits. Batches are executed in the order of submission."""

    depth: int
    chain: int
    num_blocks: tuple[int, ...]

    @property
    def now(self) -> float:
        """Seconds on this executor's clock."""
        ...

    def prepare(self, params: SamplingParams) -> Future[None] | None:
        """Make ready, beside the steps, what a request will need before it may be added; None: nothing. Any thread
        may call it. The future has an InvalidRequestError where it cannot be had."""
        ...

    def submit(self, batch: Batch) -> None: ...

    def wait(self, until: float | None) -> Result | None:
        """The next finished batch; None when ``until`` came first, or ``wake`` was called meanwhile."""
        ...

    def wake(self) -> None:
        """Make a ``wait`` in progress (or the next one) return. The only method another thread may call."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class RunsAhead(Protocol):
    """An executor in virtual time, which can take many decode steps at once."""

    def decode_ahead(
        self, requests: Sequence[Request], most: int, until: float | None
    ) -> tuple[list[list[int]], list[float]]:
        """(tokens by request, when each step ended) of up to ``most`` steps of one token for each request. Where two
        batches are in flight, the first of these steps is in flight already and one more is at the end."""
        ...
