"""One scale per component, so that predictions fit measured steps: least squares of relative errors, within bounds.

A ridge keeps every scale at 1 unless the steps say otherwise: components that no step shows do not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

from foretell.cost.profile import Profile
from foretell.cost.step import Estimate, Parts

LOWEST, HIGHEST = 0.5, 2.0  # no scale leaves these: what is farther off wants a new calibration
RIDGE = 0.02  # of a step's weight, for every scale: a sum over the steps outweighs it soon
ROUNDS, FAR = 3, 4.0  # fits, and how many times the median miss is far


@dataclass(frozen=True, slots=True)
class Scales:
    """What each component's prediction is multiplied with."""

    linear: float = 1.0
    head: float = 1.0
    decode_attention: float = 1.0
    prefill_attention: float = 1.0
    host: float = 1.0

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in COMPONENTS}

    def towards(self, other: Scales, share: float) -> Scales:
        """A part of the way."""
        mine, theirs = self.as_dict(), other.as_dict()
        return Scales(**{name: mine[name] + share * (theirs[name] - mine[name]) for name in COMPONENTS})

    def times(self, other: Scales) -> Scales:
        """One after the other, within the bounds."""
        mine, theirs = self.as_dict(), other.as_dict()
        return Scales(**{name: _bounded(mine[name] * theirs[name]) for name in COMPONENTS})

    def applied(self, profile: Profile) -> Profile:
        """The profile with its grid scaled."""
        own = profile.decode_linear
        return replace(
            profile,
            linear=profile.linear.scaled(self.linear),
            decode_linear=None if own is None else own.scaled(self.linear),
            head=profile.head.scaled(self.head),
            host=profile.host.scaled(self.host),
            decode_rate=profile.decode_rate.scaled(self.decode_attention),
            prefill_rate=profile.prefill_rate.scaled(self.prefill_attention),
        )

    def seconds(self, step: Estimate | Parts) -> float:
        """Of the step, without the host."""
        linear, head = self.linear * step.linear, self.head * step.head
        decode, prefill = (
            self.decode_attention * step.decode_attention,
            self.prefill_attention * step.prefill_attention,
        )
        total = linear + head + decode + prefill
        return total if total > step.least else step.least


COMPONENTS = tuple(field.name for field in fields(Scales))
DEVICE_PARTS = COMPONENTS[:-1]


def fitted_scales(steps: Sequence[tuple[Estimate | Parts, float]], *, ridge: float = RIDGE) -> Scales:
    """From estimates and measured seconds (without the host's) of the same steps. What stays far from the fit is left
    out of the next one: a neighbour's burst is not the machine."""
    kept = [(estimate, seconds) for estimate, seconds in steps if seconds > estimate.least and estimate.device > 0]
    scales = Scales()
    for _ in range(ROUNDS):
        scales = _least_squares(kept, ridge)
        misses = [abs(scales.seconds(estimate) / seconds - 1) for estimate, seconds in kept]
        far = FAR * median(misses) + 0.01 if misses else 0.0
        kept = [step for step, miss in zip(kept, misses, strict=True) if miss <= far]
    return scales


def _least_squares(steps: Sequence[tuple[Estimate | Parts, float]], ridge: float) -> Scales:
    """Scales at a bound stay there, and the others are solved for again."""
    import numpy as np

    if not steps:
        return Scales()
    parts = len(DEVICE_PARTS)
    parts_of = [(s.linear, s.head, s.decode_attention, s.prefill_attention) for s, _ in steps]
    shares = np.array(parts_of) / np.array([[seconds] for _, seconds in steps])
    normal = shares.T @ shares + ridge * len(steps) * np.eye(parts)
    wanted = shares.sum(axis=0) + ridge * len(steps)
    scales, free = np.ones(parts), np.ones(parts, dtype=bool)
    while free.any():
        rest = wanted[free] - normal[np.ix_(free, ~free)] @ scales[~free]
        scales[free] = np.linalg.solve(normal[np.ix_(free, free)], rest)
        outside = free & ((scales < LOWEST) | (scales > HIGHEST))
        if not outside.any():
            break
        scales = scales.clip(LOWEST, HIGHEST)
        free &= ~outside
    return Scales(*(float(scale) for scale in scales))


def _bounded(scale: float) -> float:
    return min(HIGHEST, max(LOWEST, scale))
