"""How well requests were served. Times in seconds; percentiles interpolate linearly between order statistics:
the p-th of n sorted values is at rank (n-1)·p/100 (numpy's default, type 7 of Hyndman & Fan 1996)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foretell.errors import ConfigError

_OBJECTIVE = re.compile(r"(ttft|tpot|e2e)\s*[=:]\s*(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s)?")


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order; at least one."""
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """A sample in a few numbers; all NaN when it is empty."""

    count: int
    mean: float
    std: float  # of the sample itself (divided by n)
    min: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            return cls(0, *[math.nan] * 7)
        mean = math.fsum(ordered) / len(ordered)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
        p50, p90, p99 = (percentile(ordered, percent) for percent in (50, 90, 99))
        return cls(len(ordered), mean, std, ordered[0], p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One served request on one clock. ``arrival`` is when it was due, whatever kept the sender from sending.

    ``token_times``: when each output token reached the caller. ``counted_tokens``: how many there were by the
    server's own count; fewer times than that mean that some came together. ``error``: why it was not served to
    its end.
    """

    arrival: float
    prompt_tokens: int
    token_times: Sequence[float]
    first_scheduled: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    error: str | None = None
    counted_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_times) if self.counted_tokens is None else self.counted_tokens

    @property
    def served(self) -> bool:
        return self.error is None and bool(self.token_times)

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to the first step that held it."""
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def ttft_seconds(self) -> float:
        return self.token_times[0] - self.arrival

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per output token after the first; None when there is no second, or none that came later."""
        if len(self.token_times) < 2 or self.num_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_tokens - 1)

    @property
    def itl_seconds(self) -> list[float]:
        """Each gap between two consecutive output tokens."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def e2e_seconds(self) -> float:
        return self.token_times[-1] - self.arrival


@dataclass(frozen=True, slots=True)
class Objectives:
    """Service-level objectives of each request, in seconds; None: none."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    e2e_seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """ "ttft=500ms,tpot=50ms,e2e=10s", any of them; a bare number is in milliseconds. ConfigError otherwise."""
        found: dict[str, float] = {}
        for part in text.split(","):
            match = _OBJECTIVE.fullmatch(part.strip())
            if match is None or f"{match[1]}_seconds" in found:
                raise ConfigError(f"{text!r} is no list of objectives: write ttft=500ms,tpot=50ms,e2e=10s")
            found[f"{match[1]}_seconds"] = float(match[2]) * (1.0 if match[3] == "s" else 1e-3)
        return cls(**found)

    @property
    def any(self) -> bool:
        return (self.ttft_seconds, self.tpot_seconds, self.e2e_seconds) != (None, None, None)

    def met_by(self, request: RequestTimes) -> bool:
        """All objectives at once. One that was not served misses; a single token has no TPOT to miss."""
        if not request.served:
            return False
        pairs = (
            (self.ttft_seconds, request.ttft_seconds),
            (self.tpot_seconds, request.tpot_seconds),
            (self.e2e_seconds, request.e2e_seconds),
        )
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Report:
    """A run in numbers. Rates are per second of ``duration_seconds``; goodput counts served requests that met
    every objective (all served ones when there are no objectives)."""

    requests: int
    failed: int
    duration_seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    requests_per_second: float
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    goodput_per_second: float
    good_share: float
    ttft_seconds: Spread
    tpot_seconds: Spread
    itl_seconds: Spread
    e2e_seconds: Spread
    queue_seconds: Spread

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: the spread of an empty sample becomes None."""
        return {
            name: None if isinstance(value, dict) and not value["count"] else value
            for name, value in asdict(self).items()
        }


def summarize(
    requests: Sequence[RequestTimes], objectives: Objectives | None = None, duration_seconds: float | None = None
) -> Report:
    """``duration_seconds`` is by default the time from the first arrival to the last token."""
    served = [r for r in requests if r.served]
    if duration_seconds is None:
        duration_seconds = span_seconds(requests)
    good = sum(map((objectives or Objectives()).met_by, requests))
    prompt_tokens = sum(r.prompt_tokens for r in served)
    output_tokens = sum(r.num_tokens for r in served)

    def rate(count: int) -> float:
        return count / duration_seconds if duration_seconds > 0 else 0.0

    def spread(value: Callable[[RequestTimes], float | None]) -> Spread:
        return Spread.of(v for v in map(value, served) if v is not None)

    return Report(
        requests=len(requests),
        failed=len(requests) - len(served),
        duration_seconds=duration_seconds,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(r.cached_tokens for r in served),
        output_tokens=output_tokens,
        preemptions=sum(r.preemptions for r in requests),
        requests_per_second=rate(len(served)),
        prompt_tokens_per_second=rate(prompt_tokens),
        output_tokens_per_second=rate(output_tokens),
        goodput_per_second=rate(good),
        good_share=good / len(requests) if requests else 0.0,
        ttft_seconds=spread(lambda r: r.ttft_seconds),
        tpot_seconds=spread(lambda r: r.tpot_seconds),
        itl_seconds=Spread.of(gap for r in served for gap in r.itl_seconds),
        e2e_seconds=spread(lambda r: r.e2e_seconds),
        queue_seconds=spread(lambda r: r.queue_seconds),
    )


def span_seconds(requests: Sequence[RequestTimes]) -> float:
    """From the first arrival to the last token; 0 when nothing was served."""
    last = max((r.token_times[-1] for r in requests if r.token_times), default=None)
    return 0.0 if last is None else last - min(r.arrival for r in requests)
