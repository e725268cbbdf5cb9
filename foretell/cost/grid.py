"""Measured points and what lies between them: piecewise linear, and honest about what lies outside."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretell.errors import ConfigError

FARTHEST = 3.0  # doublings beyond the last measured point: farther than eight times it, nothing is said


class BeyondProfileError(ConfigError):
    """A step so far outside what was measured that a figure would be invented."""


@dataclass(frozen=True, slots=True)
class Curve:
    """y over x at measured points, x ascending. Between them linear; beyond the last the last slope goes on."""

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __call__(self, x: float) -> float:
        xs, ys = self.x, self.y
        if len(xs) == 1:
            return ys[0]
        at = min(max(bisect_right(xs, x), 1), len(xs) - 1)
        share = (x - xs[at - 1]) / (xs[at] - xs[at - 1])
        return max(0.0, ys[at - 1] + (ys[at] - ys[at - 1]) * max(0.0, share))

    def holds(self, x: float) -> bool:
        return self.x[0] <= x <= self.x[-1]

    def excess(self, x: float) -> float:
        """Doublings beyond the last point; 0 within."""
        return math.log2(x / self.x[-1]) if x > self.x[-1] else 0.0

    def scaled(self, factor: float) -> Curve:
        """The same with every y times ``factor``."""
        return Curve(self.x, tuple(y * factor for y in self.y))

    def as_dict(self) -> dict[str, Any]:
        return {"x": list(self.x), "y": list(self.y)}

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Curve:
        ordered = sorted(points)
        return cls(tuple(x for x, _ in ordered), tuple(y for _, y in ordered))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Curve:
        return cls(tuple(data["x"]), tuple(data["y"]))


@dataclass(frozen=True, slots=True)
class Surface:
    """A slowly varying rate over two sizes, at measured points: bilinear in their logarithms, constant outside.

    ``rows[i]`` is a curve over log2 of the second size, at ``sizes[i]`` of the first.
    """

    sizes: tuple[float, ...]
    rows: tuple[Curve, ...]

    def __call__(self, first: float, second: float) -> float:
        log = math.log2(max(second, 1.0))
        sizes = self.sizes
        at = bisect_right(sizes, first)
        if at == 0:
            return _clamped(self.rows[0], log)
        if at == len(sizes):
            return _clamped(self.rows[-1], log)
        low, high = math.log2(sizes[at - 1]), math.log2(sizes[at])
        share = (math.log2(first) - low) / (high - low)
        below, above = _clamped(self.rows[at - 1], log), _clamped(self.rows[at], log)
        return below + (above - below) * share

    def holds(self, first: float, second: float) -> bool:
        """Whether a measured point is not smaller in both sizes: then nothing is extrapolated that grows."""
        return self.excess(first, second) == 0

    def excess(self, first: float, second: float) -> float:
        """Doublings by which the nearest measured point falls short of these sizes; 0 within."""
        log, short = math.log2(max(second, 1.0)), math.inf
        for size, row in zip(reversed(self.sizes), reversed(self.rows), strict=True):
            beyond = max(0.0, log - row.x[-1])
            if size >= first:
                short = min(short, beyond)
                if not beyond:
                    return 0.0
            else:
                return min(short, beyond + math.log2(first / size))
        return short

    def row(self, first: float) -> Curve:
        """The rate over log2 of the second size, at this first size: the values that calling gives."""
        sizes = self.sizes
        at = bisect_right(sizes, first)
        if at in (0, len(sizes)):
            return self.rows[min(at, len(sizes) - 1)]
        below, above = self.rows[at - 1], self.rows[at]
        low, high = math.log2(sizes[at - 1]), math.log2(sizes[at])
        share = (math.log2(first) - low) / (high - low)
        xs = sorted({*below.x, *above.x})
        return Curve(tuple(xs), tuple(_clamped(below, x) * (1 - share) + _clamped(above, x) * share for x in xs))

    def reach(self, first: float) -> float:
        """The largest second size that is within the measured points at this first size; 0 if none is."""
        within = (row.x[-1] for size, row in zip(self.sizes, self.rows, strict=True) if size >= first)
        return math.exp2(max(within, default=-math.inf))

    def scaled(self, factor: float) -> Surface:
        """The same with every rate times ``factor``."""
        return Surface(self.sizes, tuple(row.scaled(factor) for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "rows": [row.as_dict() for row in self.rows]}

    @classmethod
    def of(cls, points: Sequence[tuple[float, float, float]]) -> Surface:
        """Points are (first size, second size, rate)."""
        sizes = sorted({first for first, _, _ in points})
        rows = [Curve.of([(math.log2(max(s, 1.0)), r) for f, s, r in points if f == size]) for size in sizes]
        return cls(tuple(sizes), tuple(rows))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Surface:
        return cls(tuple(data["sizes"]), tuple(Curve.from_dict(row) for row in data["rows"]))


def _clamped(row: Curve, x: float) -> float:
    return row(min(max(x, row.x[0]), row.x[-1]))
