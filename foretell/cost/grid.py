"""Measured points and what lies between them: piecewise linear, and honest about what lies outside."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


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
        log = math.log2(max(second, 1.0))
        return any(size >= first and row.x[-1] >= log for size, row in zip(self.sizes, self.rows, strict=True))

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
