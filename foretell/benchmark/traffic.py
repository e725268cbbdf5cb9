"""From the commands' options to a workload: by name, from a trace file, or drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foretell.errors import ConfigError
from foretell.trace.arrivals import arrival_times
from foretell.trace.readers import read_trace, sniff
from foretell.trace.workloads import NAMED, Lengths, Workload, named_workload, random_workload

if TYPE_CHECKING:
    from foretell.trace.readers import Encode

MAX_REQUESTS = 1_000_000
DEFAULT_LENGTH = "128"  # tokens
DEFAULT_REQUESTS = 16
GAMMA = 0.25  # burstiness of gamma arrivals unless one is given: gaps vary twice as much as a Poisson process's
ENOUGH = 1.5  # requests drawn for a duration, times those expected in it: what comes after is cut off


@dataclass(frozen=True, slots=True)
class Traffic:
    """What to ask. At most one of ``workload`` and ``trace``; neither means random lengths, of 128 tokens unless
    told otherwise."""

    workload: str | None = None
    trace: Path | None = None
    trace_format: str = "auto"
    prompt_lengths: str | None = None
    output_lengths: str | None = None
    num_requests: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    seed: int = 0

    def check(self) -> None:
        """ConfigError for what can be known to be wrong before a model is loaded."""
        if self.workload is not None and self.workload not in NAMED:
            raise ConfigError(f"unknown workload {self.workload!r}: choose one of {', '.join(NAMED)}")
        if self.workload is not None and self.trace is not None:
            raise ConfigError("--workload and --trace both name the requests: give one of them")
        if self.trace is not None and not self.trace.is_file():
            raise ConfigError(f"there is no trace file {self.trace}")
        if self.trace is None and self.trace_format != "auto":
            raise ConfigError("--trace-format is of a trace: give --trace too")
        if (self.workload or self.trace) and (self.prompt_lengths or self.output_lengths):
            raise ConfigError(
                "--input-len and --output-len draw lengths, and a workload or trace has its own: "
                "--max-input-len and --max-output-len cut those"
            )
        self._lengths()

    @property
    def timed(self) -> bool:
        """Whether the requests have arrival times of their own."""
        if self.trace is None:
            return False
        try:
            return (sniff(self.trace) if self.trace_format == "auto" else self.trace_format) != "sharegpt"
        except (OSError, UnicodeDecodeError):
            return True  # reading it will say what is wrong

    def _lengths(self) -> tuple[Lengths, Lengths]:
        return Lengths.parse(self.prompt_lengths or DEFAULT_LENGTH), Lengths.parse(
            self.output_lengths or DEFAULT_LENGTH
        )

    def build(
        self, vocab_size: int, encode: Encode | None = None, *, default_requests: int = DEFAULT_REQUESTS
    ) -> Workload:
        """All requests, with the trace's own arrival times if there is one, else all at once."""
        if self.trace is not None:
            found = read_trace(self.trace, self.trace_format, max_requests=self.num_requests, encode=encode)
        elif self.workload is not None:
            found = named_workload(self.workload, vocab_size)
        else:
            found = random_workload(self.num_requests or default_requests, *self._lengths(), self.seed)
        return found.adjusted(
            max_requests=self.num_requests,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
        )


def burstiness_of(kind: str, burstiness: float | None) -> float:
    """Of arrivals named "poisson", "gamma" or "constant". ConfigError where the number contradicts the name; a number
    alone means gamma, as it always did."""
    if kind == "constant":
        if burstiness is not None:
            raise ConfigError("constant arrivals have no burstiness: leave one of the two out")
        return math.inf
    if kind == "gamma":
        return GAMMA if burstiness is None else burstiness
    return 1.0 if burstiness is None else burstiness


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When to ask: at a rate, or at the trace's own times stretched by ``time_scale``."""

    rate: float | None = None
    burstiness: float = 1.0
    time_scale: float = 1.0
    duration_seconds: float | None = None
    ramp_to: float | None = None

    def check(self, *, timed: bool) -> None:
        """ConfigError for impossible figures, and for those that would change nothing. ``timed``: the workload has
        times of its own, which hold unless there is a rate."""
        if self.duration_seconds is not None and not math.isfinite(self.duration_seconds):
            raise ConfigError("--duration is a finite number of seconds; without it everything is sent")
        if not math.isfinite(self.time_scale):
            raise ConfigError("--time-scale is a finite number")
        if self.time_scale != 1 and (self.rate is not None or not timed):
            raise ConfigError("--time-scale stretches a trace's own times: give --trace, and no --rate")
        if self.rate is not None:
            arrival_times(0, self.rate, burstiness=self.burstiness, ramp_to=self.ramp_to)
        elif self.ramp_to is not None:
            raise ConfigError("a ramp needs --rate, the rate it starts from")
        elif self.burstiness != 1:
            raise ConfigError("--burstiness is of arrivals at a rate: give --rate")

    def apply(self, workload: Workload, seed: int) -> Workload:
        if self.rate is not None:
            times = arrival_times(
                len(workload.requests),
                self.rate,
                burstiness=self.burstiness,
                seed=seed,
                ramp_to=self.ramp_to,
                ramp_seconds=self.duration_seconds,
            )
            workload = workload.arriving_at(times)
        scale = self.time_scale if self.rate is None else 1.0
        return workload.adjusted(time_scale=scale, duration_seconds=self.duration_seconds)

    def requests_needed(self) -> int | None:
        """How many to draw so that the duration is filled; None without a (finite) rate or a duration."""
        if self.rate is None or self.duration_seconds is None or math.isinf(self.rate):
            return None
        mean_rate = self.rate if self.ramp_to is None else (self.rate + self.ramp_to) / 2
        return min(MAX_REQUESTS, int(mean_rate * self.duration_seconds * ENOUGH) + 20)
