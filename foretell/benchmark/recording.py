"""What happened in a virtual run, step by step: KV use, queue, how busy it was; and as a timeline for Perfetto."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretell.core.ahead import Stretch
from foretell.core.engine import Engine
from foretell.core.messages import Batch, Result
from foretell.errors import ConfigError
from foretell.trace.metrics import RequestTimes

MICRO = 1e6


@dataclass(frozen=True, slots=True)
class Moment:
    """A step, or a stretch of ``steps`` of decodes alone. ``tokens`` are those of one step."""

    started: float
    finished: float
    steps: int
    sequences: int
    tokens: int
    prompt_tokens: int
    running: int
    waiting: int
    kv_usage: float

    @property
    def seconds(self) -> float:
        return self.finished - self.started


@dataclass(frozen=True, slots=True)
class Load:
    """Means over time, idle time included; ``busy_share`` is the rest of it. ``sequences_per_step`` is by step."""

    busy_share: float
    kv_usage_mean: float
    kv_usage_max: float
    waiting_mean: float
    waiting_max: int
    running_mean: float
    running_max: int
    sequences_per_step: float
    tokens_per_step: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Recording:
    """The watcher of a virtual engine: hears of every step, and is told of stretches."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []
        self.engine: Engine | None = None

    def watch(self, engine: Engine) -> None:
        self.engine = engine
        engine.watcher = self

    def figures(self) -> dict[str, Any]:
        return {}

    def __call__(self, batch: Batch, result: Result) -> None:
        tokens = batch.num_tokens
        prompt = sum(chunk.length for chunk in batch.chunks if chunk.length > 1)
        self._add(result.started, result.finished, 1, len(batch.chunks), tokens, prompt)

    def stretch(self, stretch: Stretch, started: float) -> None:
        count = len(stretch.request_ids)
        self._add(started, stretch.finished[-1], len(stretch.finished), count, count, 0)

    def _add(self, started: float, finished: float, steps: int, sequences: int, tokens: int, prompt: int) -> None:
        if self.engine is None:
            raise RuntimeError("a recording must watch an engine first")
        scheduler = self.engine.scheduler
        self.moments.append(
            Moment(
                started, finished, steps, sequences, tokens, prompt, len(scheduler.running), scheduler.num_waiting,
                scheduler.blocks.usage,
            )
        )  # fmt: skip

    def load(self, seconds: float) -> Load:
        """Over a run of so many seconds."""
        moments, total = self.moments, max(seconds, 1e-12)
        steps = max(1, sum(m.steps for m in moments))

        def mean(values: Sequence[float]) -> float:
            return math.fsum(value * m.seconds for value, m in zip(values, moments, strict=True)) / total

        return Load(
            busy_share=math.fsum(m.seconds for m in moments) / total,
            kv_usage_mean=mean([m.kv_usage for m in moments]),
            kv_usage_max=max((m.kv_usage for m in moments), default=0.0),
            waiting_mean=mean([m.waiting for m in moments]),
            waiting_max=max((m.waiting for m in moments), default=0),
            running_mean=mean([m.running for m in moments]),
            running_max=max((m.running for m in moments), default=0),
            sequences_per_step=sum(m.sequences * m.steps for m in moments) / steps,
            tokens_per_step=sum(m.tokens * m.steps for m in moments) / steps,
        )


def timeline(requests: Sequence[RequestTimes], moments: Sequence[Moment], title: str) -> dict[str, Any]:
    """In the Trace Event Format, which Perfetto and chrome://tracing read: steps on one track, counters under it,
    and the requests in as many lanes as were open at once. Times in microseconds of virtual time."""
    events: list[dict[str, Any]] = [
        _name("process_name", 1, 0, title), _name("thread_name", 1, 1, "steps"),
        _name("process_name", 2, 0, "requests"),
    ]  # fmt: skip
    for moment in moments:
        kind = (
            "decode" if not moment.prompt_tokens else "prefill" if moment.prompt_tokens == moment.tokens else "mixed"
        )
        name = kind if moment.steps == 1 else f"{kind} × {moment.steps}"
        figures = {name: value for name, value in asdict(moment).items() if name not in ("started", "finished")}
        events.append(_span(name, kind, 1, 1, moment.started, moment.finished, figures))
        counters = {"running": moment.running, "waiting": moment.waiting}
        events.append(_counter("requests", moment.started, counters))
        events.append(_counter("KV cache, %", moment.started, {"used": round(100 * moment.kv_usage, 2)}))
    for index, lane, request in _lanes(requests):
        figures = {"request": index, "prompt_tokens": request.prompt_tokens, "output_tokens": request.num_tokens,
                   "cached_tokens": request.cached_tokens, "preemptions": request.preemptions}  # fmt: skip
        begun = request.arrival if request.first_scheduled is None else request.first_scheduled
        first, last = request.token_times[0], request.token_times[-1]
        for name, start, end in (
            ("queue", request.arrival, begun),
            ("prefill", begun, first),
            ("decode", first, last),
        ):
            if end > start:
                events.append(_span(f"{index} {name}", name, 2, lane, start, end, figures))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_timeline(file: Path, requests: Sequence[RequestTimes], moments: Sequence[Moment], title: str) -> None:
    try:
        file.write_text(json.dumps(timeline(requests, moments, title)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None


def _lanes(requests: Sequence[RequestTimes]) -> list[tuple[int, int, RequestTimes]]:
    """(index, lane, request) of those served: each in the lowest lane that is free when it arrives."""
    found: list[tuple[int, int, RequestTimes]] = []
    free_from: list[float] = []
    served = [(index, request) for index, request in enumerate(requests) if request.served]
    for index, request in sorted(served, key=lambda item: item[1].arrival):
        lane = next((i for i, free in enumerate(free_from) if free <= request.arrival), len(free_from))
        if lane == len(free_from):
            free_from.append(0.0)
        free_from[lane] = request.token_times[-1]
        found.append((index, lane + 1, request))
    return found


def _span(
    name: str, category: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    return {"name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid, "ts": start * MICRO,
            "dur": (end - start) * MICRO, "args": args}  # fmt: skip


def _counter(name: str, at: float, values: Mapping[str, float]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": 1, "ts": at * MICRO, "args": values}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
