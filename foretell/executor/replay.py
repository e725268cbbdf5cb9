"""Replay a recorded run in the virtual executor: the twin that proves the simulator is the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foretell.core.engine import Engine
from foretell.core.messages import Batch, ChunkResult, Result
from foretell.executor.virtual import VirtualExecutor


class ReplayExecutor(VirtualExecutor):
    """Gives back, for the batches the brain decides on now, the sampled ids and completion times of the log.
    It never sees recorded batches or block tables."""

    def __init__(self, num_blocks: tuple[int, ...], *, depth: int = 1, chain: int = 0) -> None:
        super().__init__(lambda batch: 0.0, num_blocks, depth=depth, chain=chain)
        self.submitted: list[Batch] = []
        self.next_event: dict[str, Any] = {}

    def submit(self, batch: Batch) -> None:
        self.submitted.append(batch)

    def wait(self, until: float | None) -> Result | None:
        event = self.next_event
        self.now = event["now"]
        if event["event"] != "result":
            return None
        tokens, ended = event["tokens"], event["ended"]
        results = [ChunkResult(i, token_id=token, ended=i in ended) for i, token in tokens.items()]
        results += [ChunkResult(i, embedding=[]) for i in ended if i not in tokens]
        results += [ChunkResult(i, error=error) for i, error in event["errors"].items()]
        return Result(event["batch"], results, self.now, self.now)


def replay(events: Sequence[dict[str, Any]], engine: Engine) -> None:
    """Feed an event log to an engine whose executor is a ReplayExecutor."""
    executor = engine.executor
    if not isinstance(executor, ReplayExecutor):
        raise TypeError("replay needs an engine with a ReplayExecutor")
    for event in events:
        kind = event["event"]
        executor.next_event = event
        if kind in ("result", "wake"):
            engine.step(until=event["now"])
            continue
        executor.now = event["now"]
        if kind == "add":
            engine.add(event["id"], event["tokens"], event["params"], priority=event["priority"])
        elif kind == "finish":
            engine.finish(event["id"], event["reason"])
        elif kind == "preempt":
            engine.preempt(event["id"], event["reason"])
        elif kind == "policy":
            engine.set_policy(event["name"])
