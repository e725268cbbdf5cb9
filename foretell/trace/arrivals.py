"""When requests arrive: a Poisson process, one with gamma-distributed gaps for burstier or steadier traffic, or
a clock's ticks; at a constant rate or one that climbs."""

from __future__ import annotations

import math
import random
from itertools import accumulate

from foretell.errors import ConfigError


def arrival_times(
    count: int,
    rate: float,
    *,
    burstiness: float = 1.0,
    seed: int = 0,
    ramp_to: float | None = None,
    ramp_seconds: float | None = None,
) -> list[float]:
    """``count`` arrival times in seconds, ascending from 0, with ``rate`` requests per second on average.

    Gaps are gamma-distributed with mean 1/rate and coefficient of variation 1/√burstiness: 1 is a Poisson
    process, below 1 is bursty, above 1 steadier, infinity constant. An infinite rate means that all arrive at
    once. With ``ramp_to`` the rate changes linearly from ``rate`` to that, in ``ramp_seconds`` or, without
    them, in the time that ``count`` requests take.
    """
    for value in (rate, rate if ramp_to is None else ramp_to):
        if not value > 0:
            raise ConfigError(f"the arrival rate is in requests per second and must be above 0, got {value!r}")
    if not burstiness > 0:
        raise ConfigError(f"burstiness must be above 0 (1: Poisson, below: bursts), got {burstiness!r}")
    if ramp_to is not None and math.isinf(rate + ramp_to):
        raise ConfigError("a ramp goes from one finite rate to another")
    if math.isinf(rate):
        return [0.0] * count
    expected = accumulate(_unit_gaps(count, burstiness, random.Random(seed)))
    if ramp_to is None or ramp_to == rate:
        return [n / rate for n in expected]
    seconds = 2 * max(1, count) / (rate + ramp_to) if ramp_seconds is None else ramp_seconds
    return [_ramp_time(n, rate, (ramp_to - rate) / seconds, seconds) for n in expected]


def _unit_gaps(count: int, burstiness: float, rng: random.Random) -> list[float]:
    """Gaps of mean 1."""
    if math.isinf(burstiness):
        return [1.0] * count
    if burstiness == 1:
        return [rng.expovariate(1.0) for _ in range(count)]
    return [rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count)]


def _ramp_time(expected: float, rate: float, slope: float, seconds: float) -> float:
    """When rate·t + slope·t²/2 requests were expected: a process of rate 1, its time stretched (Çinlar 1975).
    Past the ramp's end the last rate holds, so that a late last arrival always has a time."""
    whole = rate * seconds + slope * seconds**2 / 2
    if expected >= whole:
        return seconds + (expected - whole) / (rate + slope * seconds)
    # 2n / (r + √(r² + 2·s·n)) is the root of the quadratic without cancellation, for slopes of either sign
    return 2 * expected / (rate + math.sqrt(max(0.0, rate**2 + 2 * slope * expected)))
