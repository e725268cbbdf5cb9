"""The virtual executor: a clock that jumps and a cost function instead of a device. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from foretell.core.messages import Batch, Chunk, ChunkResult, Result

VIRTUAL_EOS = -1  # the token id that ends a virtual request; give it as a stop id


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a step = fixed + per token computed + per KV token read. A first, plain cost function."""

    step_seconds: float = 0.005
    seconds_per_token: float = 0.0005
    seconds_per_kv_token: float = 2e-8

    def __call__(self, batch: Batch) -> float:
        kv_tokens = sum(chunk.start + chunk.length for chunk in batch.chunks)
        return self.step_seconds + self.seconds_per_token * batch.num_tokens + self.seconds_per_kv_token * kv_tokens


class VirtualExecutor:
    """Batches take the time the cost function says, one after another. Output lengths are its secret: the
    scheduler learns that a request ends when VIRTUAL_EOS comes, as it would from a model."""

    def __init__(
        self,
        cost: Callable[[Batch], float],
        num_blocks: tuple[int, ...],
        *,
        depth: int = 1,
        chain: int = 0,
        output_lengths: Mapping[int, int] | None = None,
    ) -> None:
        self.cost = cost
        self.num_blocks = num_blocks
        self.depth = depth
        self.chain = chain
        self.now = 0.0
        self._lengths = output_lengths or {}
        self._emitted: dict[int, int] = {}  # by request: output tokens so far, kept over preemptions
        self._queue: deque[Result] = deque()
        self._busy_until = 0.0

    def submit(self, batch: Batch) -> None:
        started = max(self.now, self._busy_until)
        self._busy_until = started + self.cost(batch)
        for added in batch.added:
            self._emitted[added.request_id] = len(added.output_token_ids)
        results = [self._sample(chunk) for chunk in batch.chunks if chunk.sample]
        self._queue.append(Result(batch.id, results, started, self._busy_until))

    def _sample(self, chunk: Chunk) -> ChunkResult:
        index = self._emitted[chunk.request_id]
        self._emitted[chunk.request_id] = index + 1
        ends = index + 1 >= self._lengths.get(chunk.request_id, 2**62)
        return ChunkResult(chunk.request_id, VIRTUAL_EOS if ends else synthetic_token(chunk.request_id, index))

    def wait(self, until: float | None) -> Result | None:
        if self._queue and (until is None or self._queue[0].finished <= until):
            result = self._queue.popleft()
            self.now = max(self.now, result.finished)
            return result
        if until is not None:
            self.now = max(self.now, until)
        return None

    def wake(self) -> None:
        """Nothing waits in virtual time."""

    def close(self) -> None:
        """Nothing to free."""


def synthetic_token(request_id: int, index: int) -> int:
    """A token id that depends on request and output position alone (Knuth's multiplicative hash)."""
    return (request_id * 1_000_003 + index) * 2_654_435_761 % 50_000
