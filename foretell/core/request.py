"""A request as the scheduler sees it: tokens known, tokens planned, blocks held."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from foretell.core.counters import Progress
from foretell.core.params import SamplingParams


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """``planned`` counts tokens that a submitted batch computes or has computed; it catches up with the
    tokens known. ``pending`` counts sampled tokens that have not come back: they are known to exist but
    not by value. The phase is derived: prefill until everything known at (re)admission is planned.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached_tokens",
        "chain",
        "expected_end",
        "finish_reason",
        "first_scheduled",
        "hashes",
        "id",
        "in_flight",
        "key",
        "last_turn",
        "max_total_tokens",
        "order",
        "params",
        "pending",
        "planned",
        "preemptions",
        "prefill_end",
        "progress_due",
        "prompt_len",
        "published",
        "releasable_from",
        "state",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival: float = 0.0,
    ) -> None:
        self.id = request_id
        self.tokens: list[int] = list(prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.params = params
        self.stop_ids = params.stop_ids
        self.max_total_tokens = 0  # set on admission to the engine: context, cache and max_tokens
        self.chain = 0  # likewise: how many sampled tokens may be pending when the next is scheduled
        self.arrival = arrival
        self.order = 0
        self.key: tuple[int, int] = (priority, 0)
        self.last_turn = 0
        self.planned = 0
        self.pending = 0
        self.in_flight = 0
        self.prefill_end = 0
        self.state = State.WAITING
        self.blocks: list[list[int]] = []  # per KV group, the block table
        self.releasable_from: list[int] = []  # per KV group, logical blocks below it are already dropped
        self.hashes: list[bytes] = []  # chained hash of each full block of known tokens
        self.published = 0  # full blocks whose hashes are in the prefix cache
        self.expected_end = 0  # full blocks that it has, or was to compute when it was admitted
        self.cached_tokens = 0  # taken from the prefix cache at the last admission
        self.preemptions = 0
        self.first_scheduled: float | None = None
        self.finish_reason: str | None = None
        self.progress_due = True  # with its next token, who asked hears how it has fared

    @property
    def num_tokens(self) -> int:
        """Tokens known to exist, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def in_prefill(self) -> bool:
        return self.planned < self.prefill_end or self.state is State.WAITING

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def progress(self) -> Progress:
        return Progress(self.first_scheduled or 0.0, self.cached_tokens, self.preemptions)
