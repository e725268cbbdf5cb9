"""A model that takes no time: what is left is the cost of everything around it. No torch."""

from __future__ import annotations

import time

from foretell.core.messages import Batch, ChunkResult


class InstantRunner:
    """In place of a ``ModelRunner``: token i of an output is one of ``num_ids``, and follows from its prompt alone,
    so that whoever gets it can tell whether it is the right one. ``step_seconds``: each step waits so long."""

    def __init__(self, num_ids: int, *, step_seconds: float = 0.0) -> None:
        self.num_ids = num_ids
        self.step_seconds = step_seconds
        self.parts: dict[str, float] = {}
        self._next: dict[int, int] = {}  # by request: its next token

    def execute(self, batch: Batch) -> list[ChunkResult]:
        for request_id in batch.removed:
            self._next.pop(request_id, None)
        for added in batch.added:
            self._next[added.request_id] = first_token(added.prompt_token_ids, self.num_ids) + len(
                added.output_token_ids
            )
        if self.step_seconds:
            time.sleep(self.step_seconds)
        return [
            ChunkResult(chunk.request_id, self._sample(chunk.request_id)) for chunk in batch.chunks if chunk.sample
        ]

    def _sample(self, request_id: int) -> int:
        token = self._next[request_id]
        self._next[request_id] = token + 1
        return token % self.num_ids

    def release(self) -> None:
        self._next.clear()


def first_token(prompt_token_ids: list[int], num_ids: int) -> int:
    """Of the tokens 0 … ``num_ids`` - 1, which go round from there."""
    return sum(prompt_token_ids) % num_ids
