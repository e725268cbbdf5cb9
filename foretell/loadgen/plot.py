"""A run as one picture: latencies over time, load over time, and how each latency is distributed. SVG of our own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate
from pathlib import Path

from foretell.benchmark.tables import number
from foretell.errors import ConfigError
from foretell.trace.metrics import Objectives, Report, RequestTimes, percentile

Points = list[tuple[float, float]]
WIDTH, MARGIN, GAP = 960, 58, 42
BLUE, ORANGE, RED, GREY = "#2563a8", "#d97706", "#b91c1c", "#8a8f98"
MOST_POINTS = 3000
STYLE = """
  svg { background: #fff; font: 12px system-ui, sans-serif; fill: #24292f }
  .axis { stroke: #c5cad1; stroke-width: 1 } .grid { stroke: #eceff3; stroke-width: 1 }
  .title { font-weight: 600 } .small { fill: #667; font-size: 11px } .line { fill: none; stroke-width: 1.6 }
"""


@dataclass(slots=True)
class Panel:
    """One pair of axes. ``left``, ``y``, ``width`` and ``height`` in pixels, values in the units of the axes."""

    title: str
    x_name: str
    left: float
    y: float
    width: float
    height: float
    x_max: float
    y_max: float
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = self.left + min(1.0, x / self.x_max) * self.width
        return across, self.y + self.height * (1 - min(1.0, y / self.y_max))

    def dots(self, points: Points, color: str, radius: float = 1.8) -> None:
        for x, y in map(self.at, *zip(*thinned(points), strict=True)) if points else ():
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}" fill-opacity=".55"/>')

    def line(self, points: Points, color: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        self.parts.append(f'<polyline class="line" points="{path}" stroke="{color}"/>')

    def upright(self, x: float, label: str, color: str, share: float) -> None:
        """A line at ``x``, its label at ``share`` of the height, on the side that has room."""
        if x > self.x_max:
            return
        across, down = self.at(x, self.y_max * share)
        side, anchor = (4, "start") if x < 0.6 * self.x_max else (-4, "end")
        self.parts.append(
            f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{self.y}" y2="{self.y + self.height}" stroke="{color}" '
            f'stroke-dasharray="3 3"/><text class="small" text-anchor="{anchor}" x="{across + side:.1f}" '
            f'y="{down + 4:.1f}">{escape(label)}</text>'
        )

    def svg(self) -> str:
        frame = [f'<text class="title" x="{self.left}" y="{self.y - 9}">{escape(self.title)}</text>']
        bottom = self.y + self.height
        for value in ticks(self.y_max):
            _, down = self.at(0, value)
            frame.append(
                f'<line class="grid" x1="{self.left}" x2="{self.left + self.width}" y1="{down:.1f}" y2="{down:.1f}"/>'
                f'<text class="small" text-anchor="end" x="{self.left - 5}" y="{down + 4:.1f}">{value:,g}</text>'
            )
        for value in ticks(self.x_max, 4 if self.width < 300 else 8):
            across, _ = self.at(value, 0)
            text = f'<text class="small" text-anchor="middle" x="{across:.1f}" y="{bottom + 15}">{value:,g}</text>'
            frame.append(text)
        frame.append(
            f'<line class="axis" x1="{self.left}" x2="{self.left + self.width}" y1="{bottom}" y2="{bottom}"/>'
        )
        name = f'<text class="small" text-anchor="end" x="{self.left + self.width}" y="{self.y - 9}">'
        frame.append(f"{name}{escape(self.x_name)}</text>")
        return "\n".join([*frame, *self.parts])


def ticks(top: float, about: int = 4) -> list[float]:
    """Round values from 0 to ``top``: steps of 1, 2 or 5 times a power of ten."""
    if not (top > 0 and math.isfinite(top)):
        return [0.0]
    rough = top / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(int(top / step * (1 + 1e-9)) + 1)]


def thinned(points: Points) -> Points:
    return points[:: max(1, -(-len(points) // MOST_POINTS))]


def open_requests(requests: Sequence[RequestTimes]) -> Points:
    """How many had arrived and not ended, over time."""
    changes = sorted(
        change for r in requests if r.served for change in ((r.arrival, 1), (r.token_times[-1], -1))
    )  # fmt: skip
    counts = accumulate(step for _, step in changes)
    return [(0.0, 0.0), *((time, float(now)) for (time, _), now in zip(changes, counts, strict=True))]


def token_rate(requests: Sequence[RequestTimes], seconds: float, slices: int = 120) -> Points:
    """Output tokens per second in each slice of the run, as the pieces arrived."""
    width = seconds / slices
    counts = [0.0] * slices
    for request in requests:
        if request.served:
            weight = request.num_tokens / len(request.token_times)
            for time in request.token_times:
                counts[min(slices - 1, max(0, int(time / width)))] += weight / width
    return [((i + 0.5) * width, value) for i, value in enumerate(counts)]


def picture(title: str, requests: Sequence[RequestTimes], report: Report, objectives: Objectives) -> str:
    """The SVG document."""
    served = [r for r in requests if r.served]
    seconds = max((r.token_times[-1] for r in served), default=1.0) or 1.0
    inner = WIDTH - 2 * MARGIN
    ttft = [(r.arrival, r.ttft_seconds * 1e3) for r in served]
    e2e = [(r.arrival, r.e2e_seconds * 1e3) for r in served]
    opened, rate = open_requests(requests), token_rate(requests, seconds)
    half = (inner - MARGIN) / 2
    panels = [
        _over_time("TTFT, ms", ttft, seconds, MARGIN, 84, half, BLUE),
        _over_time("end to end, ms", e2e, seconds, MARGIN * 2 + half, 84, half, BLUE),
        Panel("requests under way", "s", MARGIN, 314, half, 130, seconds, _top(y for _, y in opened)),
        Panel("output tokens per second", "s", MARGIN * 2 + half, 314, half, 130, seconds, _top(y for _, y in rate)),
    ]
    failed = [(r.arrival, panels[0].y_max) for r in requests if not r.served]
    panels[0].dots(failed, RED, 3)
    panels[2].line(thinned(opened), ORANGE)
    panels[3].line(rate, ORANGE)
    panels += _distributions(served, objectives, inner)
    words = (
        f"{len(served)} of {len(requests)} served, {number(report.requests_per_second)} requests/s, "
        f"{number(report.output_tokens_per_second)} output tok/s"
        + ("; red: not served" if failed else "")
        + (f"; {100 * report.good_share:.0f} % met every objective" if objectives.any else "")
    )
    body = "\n".join(panel.svg() for panel in panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 690" width="{WIDTH}" height="690">\n'
        f"<style>{STYLE}</style>\n"
        f'<text x="{MARGIN}" y="26" font-size="15" font-weight="600">{escape(title)}</text>\n'
        f'<text class="small" x="{MARGIN}" y="46">{escape(words)}</text>\n{body}\n</svg>\n'
    )


def _over_time(title: str, points: Points, seconds: float, left: float, y: float, width: float, color: str) -> Panel:
    panel = Panel(title, "s, when it was due", left, y, width, 170, seconds, _top(value for _, value in points))
    panel.dots(points, color)
    return panel


def _distributions(served: Sequence[RequestTimes], objectives: Objectives, inner: float) -> list[Panel]:
    samples = {
        "TTFT": ([r.ttft_seconds for r in served], objectives.ttft_seconds),
        "TPOT": ([r.tpot_seconds for r in served if r.tpot_seconds is not None], objectives.tpot_seconds),
        "ITL": ([gap for r in served for gap in r.itl_seconds], None),
        "E2E": ([r.e2e_seconds for r in served], objectives.e2e_seconds),
    }
    width = (inner - 3 * GAP) / 4
    return [
        _distribution(
            name,
            sorted(1e3 * v for v in values),
            None if slo is None else 1e3 * slo,
            MARGIN + i * (width + GAP),
            width,
        )
        for i, (name, (values, slo)) in enumerate(samples.items())
    ]


def _distribution(name: str, ordered: list[float], objective: float | None, left: float, width: float) -> Panel:
    """Share of the sample at or below each value, drawn to its 99.5th percentile."""
    right = _top([percentile(ordered, 99.5)] if ordered else [], objective)
    panel = Panel(f"{name}: share below", "ms", left, 510, width, 140, right, 1.0)
    if ordered:
        percents = [i / 2 for i in range(201)]
        panel.line([(0.0, 0.0), *((percentile(ordered, p), p / 100) for p in percents)], BLUE)
        panel.upright(percentile(ordered, 50), f"P50 {number(percentile(ordered, 50))}", GREY, 0.6)
        panel.upright(percentile(ordered, 99), f"P99 {number(percentile(ordered, 99))}", GREY, 0.9)
    if objective is not None:
        panel.upright(objective, f"objective {number(objective)}", RED, 0.3)
    return panel


def _top(values: Iterable[float], least: float | None = None) -> float:
    found = max(values, default=0.0)
    return max(found, least or 0.0) * 1.05 or 1.0


def write_plot(file: Path, svg: str, table: str) -> None:
    """The picture alone (.svg), or a page with the table under it (.html)."""
    if file.suffix.lower() == ".html":
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>foretell bench serve</title>'
            f'<body style="font-family: system-ui; margin: 2em">{svg}<pre>{escape(table)}</pre></body></html>\n'
        )
    else:
        page = svg
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None


def check_plot_name(file: Path | None) -> None:
    """ConfigError before the run, not after it."""
    if file is not None and file.suffix.lower() not in (".svg", ".html"):
        raise ConfigError(f"--plot {file}: the name must end in .svg or .html")
