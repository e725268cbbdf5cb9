"""The virtual executor for decodes in lockstep (core.lockstep): groups are submitted and timed as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from foretell.core.group import GroupBatch
from foretell.core.messages import Batch, Chunk, Result
from foretell.executor.virtual import VirtualExecutor, synthetic_run


class GroupCost(Protocol):
    """Seconds of a batch, and of one with decodes that are known by their number and their keys alone."""

    def __call__(self, batch: Batch) -> float: ...

    def with_decodes(self, chunks: Sequence[Chunk], decodes: int, kv_tokens: int) -> float: ...

    def decode_seconds(self, positions: Sequence[int]) -> Iterator[float]: ...


class LockstepExecutor(VirtualExecutor):
    """Requests end at their ``max_tokens``: lengths are no secret here."""

    cost: GroupCost

    def __init__(self, cost: GroupCost, num_blocks: tuple[int, ...], *, depth: int = 1, chain: int = 0) -> None:
        super().__init__(cost, num_blocks, depth=depth, chain=chain)

    def submit(self, batch: Batch) -> None:
        part = batch.together if isinstance(batch, GroupBatch) else None
        if part is None:
            super().submit(batch)
            return
        lengths = [chunk.length for chunk in batch.chunks]
        started = self.ready_at
        self._busy_until = started + self.cost.with_decodes(batch.chunks, part.count, part.kv_tokens)
        self.most_tokens = max(self.most_tokens, sum(lengths) + part.count)
        self.longest_chunk = max(self.longest_chunk, 1, *lengths)
        for added in batch.added:
            self._emitted[added.request_id] = len(added.output_token_ids)
        self._queue.append(Result(batch.id, self._sampled(batch.chunks), started, self._busy_until))

    @property
    def ready_at(self) -> float:
        return max(self.now, self._busy_until)

    def output_tokens(self, request_id: int, first: int, end: int) -> list[int]:
        return synthetic_run(request_id, first, end)

    def resume(self, request_id: int, outputs: int) -> None:
        self._emitted[request_id] = outputs

    def decode_seconds(self, sequences: int, kv_tokens: int) -> Iterator[float]:
        each, more = divmod(kv_tokens - sequences, sequences)
        return self.cost.decode_seconds([each + 1] * more + [each] * (sequences - more))

    def decoded(self, sequences: int, steps: int, seconds: float) -> None:
        if steps:
            self.most_tokens = max(self.most_tokens, sequences)
            self._account(sequences, steps, seconds)

    def jump(self, now: float, flying: tuple[int, float] | None) -> None:
        self.now = self._busy_until = now
        self._queue.clear()
        if flying is not None:
            batch_id, self._busy_until = flying
            self._queue.append(Result(batch_id, [], now, self._busy_until))
