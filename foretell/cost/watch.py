"""The live check: every step's prediction beside its time, and a profile that follows a machine which drifts.

What it finds is a scale per component (``cost.refit``), moved slowly and within bounds: a burst of a neighbour's
work shall not teach it anything, a slower clock shall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from foretell.core.messages import Batch, Result
from foretell.cost.grid import FARTHEST
from foretell.cost.profile import Profile
from foretell.cost.refit import Scales, fitted_scales
from foretell.cost.step import Parts, StepCost

WINDOW = 256  # steps that a fit looks at
EVERY = 128  # steps between two fits
COST_SECONDS, MOST_SHARE = 2e-5, 0.005  # what a look at a step takes, and may take of it: quick steps are looked at
# now and then
SHARE = 0.25  # of the way to what the last steps say, at each fit
WRONG, PERSISTENT = 0.15, 4  # a typical step this far off the profile, at so many fits in a row


class StepWatch:
    """Callable with a finished batch and its result, in the engine's thread; some microseconds each, less than a
    hundredth of a step.

    ``on_wrong`` is called once, when the profile has been off for a while: a plan that was made with it should be
    made again with ``refitted``.
    """

    def __init__(self, profile: Profile, on_wrong: Callable[[StepWatch], None] | None = None) -> None:
        self.profile = profile
        self.scales = Scales()
        self.on_wrong = on_wrong
        self.wrong = False
        self.steps = self.inside = self.beyond = 0
        self.predicted_seconds = self.measured_seconds = 0.0
        self._cost = StepCost(profile)
        self._recent: deque[tuple[Parts, float]] = deque(maxlen=WINDOW)
        self._skipped, self._stride = 0, 1
        self._off = 0

    def __call__(self, batch: Batch, result: Result) -> None:
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        measured = result.finished - result.started
        parts = self._cost.parts(batch.chunks)
        if parts.excess > FARTHEST:
            self.beyond += 1
            return
        predicted = self.scales.seconds(parts)
        if not (measured > 0 and predicted > 0):
            return
        self.steps += 1
        self.predicted_seconds += predicted
        self.measured_seconds += measured
        low, high = self.profile.interval(parts.kind)
        self.inside += low * predicted <= measured <= high * predicted
        self._recent.append((parts, measured))
        if self.steps % EVERY == 0:
            self._refit()

    def refitted(self) -> Profile:
        """The profile as the steps so far say it should be."""
        return self.scales.applied(self.profile)

    @property
    def drift(self) -> float:
        """How much longer a typical step of late took than the profile said at first: 0.1 is a tenth longer."""
        ratios = [measured / parts.device for parts, measured in self._recent]
        return median(ratios) - 1 if ratios else 0.0

    def figures(self) -> dict[str, Any]:
        """For statistics and metrics. Errors are relative, of the last steps; the share is of all."""
        misses = sorted(abs(self.scales.seconds(parts) / measured - 1) for parts, measured in self._recent)
        return {
            "profile": self.profile.model,
            "calibrated": self.profile.created,
            "steps": self.steps,
            "beyond_profile": self.beyond,
            "predicted_seconds": self.predicted_seconds,
            "measured_seconds": self.measured_seconds,
            "median_error": median(misses) if misses else 0.0,
            "p90_error": misses[int(0.9 * (len(misses) - 1))] if misses else 0.0,
            "inside_interval": self.inside / self.steps if self.steps else 0.0,
            "drift": self.drift,
            "scales": self.scales.as_dict(),
            "wrong": self.wrong,
        }

    def _refit(self) -> None:
        self.scales = self.scales.towards(fitted_scales(list(self._recent)), SHARE)
        self._stride = max(1, round(COST_SECONDS / (MOST_SHARE * median(seconds for _, seconds in self._recent))))
        self._off = self._off + 1 if abs(self.drift) > WRONG else 0
        if self._off >= PERSISTENT and not self.wrong:
            self.wrong = True
            if self.on_wrong is not None:
                self.on_wrong(self)

    def words(self) -> str:
        """One line: how far off, and what follows."""
        longer = "longer" if self.drift > 0 else "shorter"
        return (
            f"steps take {100 * abs(self.drift):.0f} % {longer} than the profile of {self.profile.model} "
            f"({self.profile.created[:10]}) says: predictions follow, but what was planned with it should be planned "
            "again, and foretell calibrate run when the machine is quiet"
        )
