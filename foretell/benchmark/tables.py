"""Numbers as text: tables, and plots of a few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foretell.trace.metrics import percentile

BARS = "▁▂▃▄▅▆▇█"
CDF_PERCENTS = (10, 25, 50, 75, 90, 99)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, with thousands separated; "–" for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3)


def sparkline(values: Sequence[float], top: float | None = None) -> str:
    """One bar per value; 0 is blank."""
    top = max(values, default=0.0) if top is None else top
    if top <= 0:
        return " " * len(values)
    scaled = (math.ceil(min(1.0, value / top) * len(BARS)) for value in values)
    return "".join(BARS[level - 1] if level > 0 else " " for level in scaled)


def timeline(points: Sequence[tuple[float, float]], seconds: float, width: int = 60) -> list[float]:
    """(time, value) points, each holding until the next → the highest value in each of ``width`` slices."""
    slices = [0.0] * width
    if seconds <= 0:
        return slices
    ends = [time for time, _ in points[1:]] + [seconds]
    for (start, value), end in zip(points, ends, strict=False):
        first = min(width - 1, int(min(1.0, max(0.0, start / seconds)) * width))
        last = min(width - 1, max(first, math.ceil(min(1.0, max(0.0, end / seconds)) * width) - 1))
        for i in range(first, last + 1):
            slices[i] = max(slices[i], value)
    return slices


def cdf_rows(values: Sequence[float], width: int = 40) -> list[str]:
    """One bar per percentile, its length in proportion to the largest."""
    if not values:
        return []
    ordered = sorted(values)
    top = percentile(ordered, CDF_PERCENTS[-1]) or 1.0
    rows = []
    for percent in CDF_PERCENTS:
        value = percentile(ordered, percent)
        rows.append(f"P{percent:<3} {'█' * max(1, round(width * value / top))} {milliseconds(value)} ms")
    return rows
