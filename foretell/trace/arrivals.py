"""When requests arrive: a Poisson process, or one with gamma-distributed gaps for burstier or steadier traffic."""

from __future__ import annotations

import math
import random

from foretell.errors import ConfigError


def arrival_times(count: int, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """``count`` arrival times in seconds, ascending from 0, with ``rate`` requests per second on average.

    Gaps are gamma-distributed with mean 1/rate and coefficient of variation 1/√burstiness: 1 is a Poisson
    process, below 1 is bursty, above 1 steadier. An infinite rate means that all arrive at once.
    """
    if not rate > 0:
        raise ConfigError(f"the arrival rate is in requests per second and must be above 0, got {rate!r}")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ConfigError(f"burstiness must be above 0 (1: Poisson, below: bursts), got {burstiness!r}")
    if math.isinf(rate):
        return [0.0] * count
    rng, scale = random.Random(seed), 1 / (rate * burstiness)
    times, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate) if burstiness == 1 else rng.gammavariate(burstiness, scale)
        times.append(now)
    return times
