"""Step records of a real run, and what they add up to: the time of prefill, of decode, and around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretell.core.engine import Engine
    from foretell.llm import LLM

Record = dict[str, Any]
PHASES = ("prefill", "decode", "mixed")


def between_steps(llm: LLM, change: Callable[[Engine], None]) -> None:
    """Run ``change`` on the engine in its own thread, and wait until that is done."""
    done = threading.Event()

    def run(engine: Engine) -> None:
        try:
            change(engine)
        finally:
            done.set()

    llm.service.call(run)
    done.wait()


@contextmanager
def step_records(llm: LLM) -> Iterator[list[Record]]:
    """The records of the steps that run meanwhile. Making them costs some microseconds a step, so
    measurements that do not need them leave it out."""
    records: list[Record] = []
    kept: list[Callable[[Record], None] | None] = []

    def start(engine: Engine) -> None:
        previous = engine.on_step
        kept.append(previous)

        def record(step: Record) -> None:
            records.append(step)
            if previous is not None:
                previous(step)

        engine.on_step = record

    def stop(engine: Engine) -> None:
        engine.on_step = kept[0]

    between_steps(llm, start)
    try:
        yield records
    finally:
        between_steps(llm, stop)


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """The steps of one kind: all their chunks prefill, all decode, or mixed."""

    steps: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.seconds / self.steps if self.steps else 0.0


@dataclass(frozen=True, slots=True)
class StepSummary:
    """``parts`` are seconds by component; ``between_seconds`` passed from one step's end to the next one's
    start: scheduling, delivering, and waiting for work."""

    phases: dict[str, PhaseTime]
    parts: dict[str, float]
    between_seconds: float
    preemptions: int

    def as_dict(self) -> dict[str, Any]:
        phases = {
            name: {**asdict(p), "tokens_per_second": p.tokens_per_second, "ms_per_step": p.ms_per_step}
            for name, p in self.phases.items()
        }
        return {
            "phases": phases,
            "parts_seconds": self.parts,
            "between_seconds": self.between_seconds,
            "preemptions": self.preemptions,
        }


def summarize_steps(records: Sequence[Record]) -> StepSummary:
    totals = {name: [0, 0, 0.0] for name in PHASES}
    parts: dict[str, float] = {}
    for record in records:
        total = totals[_phase(record)]
        total[0] += 1
        total[1] += record["tokens"]
        total[2] += record["seconds"]
        for name, seconds in record["parts"].items():
            parts[name] = parts.get(name, 0.0) + seconds
    between = sum(b["started"] - a["finished"] for a, b in pairwise(records))
    return StepSummary(
        phases={
            name: PhaseTime(int(steps), int(tokens), seconds)
            for name, (steps, tokens, seconds) in totals.items()
            if steps
        },
        parts=parts,
        between_seconds=max(0.0, between),
        preemptions=sum(len(record["preempted"]) for record in records),
    )


def _phase(record: Record) -> str:
    kinds = {chunk["phase"] for chunk in record["chunks"]}
    return kinds.pop() if len(kinds) == 1 else "mixed"
