"""How fast the machine is from one moment to the next: a slower machine told from a dearer step."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foretell.cost.stepping import StepBench

SAME_PACE = 0.03  # repeated reference steps differ by about as much on a quiet machine


class Pace:
    """How fast the machine is from moment to moment, by a reference step beside what is measured."""

    def __init__(self, bench: StepBench, usual: float = 0.0) -> None:
        """``usual``: the reference step's seconds in a profile; else the median of the looks so far."""
        self._bench = bench
        self._looks: list[float] = []
        self._usual = usual

    def look(self) -> float:
        self._looks.append(self._bench.reference_seconds())
        return self.last

    @property
    def last(self) -> float:
        return self._looks[-1]

    @property
    def usual(self) -> float:
        return self._usual or (statistics.median(self._looks) if self._looks else 0.0)

    def steady(self, seconds: float, look: float) -> float:
        """What would have taken so long at the usual pace; as it is where the pace was as usual, give or take."""
        slower = look / self.usual if look and self.usual else 1.0
        return seconds if abs(slower - 1) < SAME_PACE else seconds / slower
