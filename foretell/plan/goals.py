"""What a plan is for: limits on percentiles of latencies, and what to make the most of within them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from foretell.errors import ConfigError
from foretell.trace.metrics import Objectives, RequestTimes, percentile

Objective = Literal["goodput", "latency", "cost"]
Metric = Literal["ttft", "tpot", "e2e"]
_LIMIT = re.compile(r"(ttft|tpot|e2e)(?:_p(\d{1,2}(?:\.\d{1,3})?))?\s*=\s*(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s)?")
USUAL = ("ttft", 99.0), ("tpot", 99.0)  # what is looked at where nothing is limited


@dataclass(frozen=True, slots=True)
class Limit:
    """The ``percent``-th percentile of a latency shall be at most so many seconds."""

    metric: Metric
    percent: float
    seconds: float

    @property
    def name(self) -> str:
        return measure_name(self.metric, self.percent)


def measure_name(metric: str, percent: float) -> str:
    return f"{metric}_p{percent:g}"


@dataclass(frozen=True, slots=True)
class Goal:
    """Limits, at most one for each metric, and the objective."""

    limits: tuple[Limit, ...] = ()
    objective: Objective = "goodput"

    @classmethod
    def parse(cls, slo: str | None, objective: str = "goodput") -> Goal:
        """ "ttft_p99=0.5,tpot_p99=30ms"; a bare number is in seconds, a metric without a percentile means the 99th.
        ConfigError for anything else."""
        if objective not in get_args(Objective):
            raise ConfigError(f"unknown objective {objective!r}: choose one of {', '.join(get_args(Objective))}")
        limits: list[Limit] = []
        for part in slo.split(",") if slo else ():
            match = _LIMIT.fullmatch(part.strip())
            if match is None or any(limit.metric == match[1] for limit in limits) or float(match[3]) <= 0:
                raise ConfigError(
                    f"{slo!r} is no list of objectives: write ttft_p99=0.5,tpot_p99=30ms (seconds or ms)"
                )
            metric: Metric = match[1]  # type: ignore[assignment]  # the pattern knows no others
            seconds = float(match[3]) * (1e-3 if match[4] == "ms" else 1.0)
            limits.append(Limit(metric, float(match[2] or 99), seconds))
        return cls(tuple(limits), objective)  # type: ignore[arg-type]  # checked above

    @property
    def measures(self) -> tuple[tuple[Metric, float], ...]:
        """The latencies that plans are compared by."""
        limited = tuple((limit.metric, limit.percent) for limit in self.limits)
        others = tuple(m for m in USUAL if m[0] not in {metric for metric, _ in limited})
        return (*limited, *others)  # type: ignore[arg-type]

    @property
    def objectives(self) -> Objectives:
        """The same limits on each request: one that meets them counts for goodput."""
        return Objectives(**{f"{limit.metric}_seconds": limit.seconds for limit in self.limits})

    def ratio(self, latencies: Sequence[float]) -> float:
        """The worst of the latencies over its limit: at most 1 where all limits are kept; 0 without limits.
        ``latencies``: in the order of ``measures``."""
        pairs = zip(latencies, self.limits, strict=False)
        return max((value / limit.seconds for value, limit in pairs), default=0.0)


def latency(request: RequestTimes, metric: str) -> float | None:
    if metric == "ttft":
        return request.ttft_seconds
    return request.tpot_seconds if metric == "tpot" else request.e2e_seconds


def measured(requests: Iterable[RequestTimes], goal: Goal) -> tuple[float, ...]:
    """The goal's latencies in seconds, in the order of ``measures``; infinite where nothing was served."""
    served = [request for request in requests if request.served]
    found = []
    for metric, percent in goal.measures:
        values = sorted(v for v in (latency(request, metric) for request in served) if v is not None)
        found.append(percentile(values, percent) if values else (math.inf if not served else 0.0))
    return tuple(found)
