"""What bench/predictions.py measures and says: figures of runs, every step beside its prediction, errors and bars."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foretell.benchmark.beside import COMPARED, PERCENTILES
from foretell.benchmark.tables import table
from foretell.core.messages import Batch, Result
from foretell.cost.profile import Profile
from foretell.cost.quiet import MOST_WAITED, waited_seconds
from foretell.cost.step import StepCost
from foretell.trace.metrics import Report, percentile

SHOWN = ("ttft_seconds.p50", "ttft_seconds.p99", "tpot_seconds.p50", "tpot_seconds.p99", "e2e_seconds.p50",
         "output_tokens_per_second")  # fmt: skip
BARS = {"tpot_seconds": (0.05, 0.12), "ttft_seconds": (0.10, 0.25), "output_tokens_per_second": (0.04, 0.10)}


class Steps:
    """Every real step beside its prediction, without any correction: by the clock, of all steps and of those whose
    threads never waited for a processor; and by the CPU time of the engine's thread from one step's end to the next,
    host included, which says something of an engine of one thread only."""

    def __init__(self, profile: Profile) -> None:
        self.cost = StepCost(profile)
        # kind, measured ÷ predicted by clock and by CPU time, relative bounds of the prediction, share waited
        self.found: list[tuple[str, float, float, float, float, float]] = []
        self._cpu = self._waited = 0.0

    def __call__(self, batch: Batch, result: Result) -> None:
        before, self._cpu = self._cpu, time.thread_time()
        waited, self._waited = self._waited, waited_seconds()
        estimate, seconds = self.cost.estimate(batch.chunks), result.finished - result.started
        if before:
            low, high = estimate.low / estimate.seconds, estimate.high / estimate.seconds
            clock, cpu = seconds / estimate.device, (self._cpu - before) / estimate.seconds
            share = (self._waited - waited) / seconds
            self.found.append((estimate.kind, *(round(x, 4) for x in (clock, cpu, low, high, share))))  # type: ignore[arg-type]

    def figures(self) -> dict[str, Any]:
        """For the engine's statistics: nothing."""
        return {}

    def taken(self) -> list[tuple[str, float, float, float, float, float]]:
        """Those since it was last asked."""
        found, self.found = self.found, []
        return found


def step_figures(found: Sequence[Sequence[Any]], threads: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for kind in ("decode", "prefill"):
        own = [entry for entry in found if entry[0] == kind]
        quiet = [entry for entry in own if entry[5] <= MOST_WAITED]
        for words, steps, at in (("", own, 1), (", undisturbed", quiet, 1), (", CPU time", own, 2)):
            if steps and (at == 1 or threads == 1):
                figures[kind + words] = ratios_of(steps, at)
    return figures


def ratios_of(own: Sequence[Sequence[Any]], at: int) -> dict[str, Any]:
    ratios = sorted(entry[at] for entry in own)
    return {
        "steps": len(own),
        "measured_over_predicted": [percentile(ratios, p) for p in (5, 50, 95)],
        "median_error": statistics.median(abs(1 / ratio - 1) for ratio in ratios),
        "inside_interval": sum(entry[3] <= entry[at] <= entry[4] for entry in own) / len(own),
        "median_width": statistics.median(entry[4] - entry[3] for entry in own),
    }


def figure_names() -> list[str]:
    return [f"{name}.{column}" for name in COMPARED for column in PERCENTILES] + ["output_tokens_per_second"]


def figures_of(report: Report) -> dict[str, float]:
    found = {}
    for name in figure_names():
        metric, _, column = name.partition(".")
        value = getattr(report, metric)
        found[name] = float(getattr(value, column) if column else value)
    return found


@dataclass(frozen=True)
class Run:
    """One run of a cell: how slow the machine was, what was foretold of one so slow, what was measured, its steps."""

    model: str
    cell: str
    slowness: float
    at_speed: dict[str, float]
    measured: dict[str, float]
    steps: list[Any]


def middle_and_spread(found: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """(median, spread) over the runs of each figure; spread = (largest - smallest) ÷ median."""
    middle, spread = {}, {}
    for name in figure_names():
        values = sorted(one[name] for one in found)
        middle[name] = statistics.median(values)
        spread[name] = (values[-1] - values[0]) / middle[name] if middle[name] else 0.0
    return middle, spread


def print_report(model: str, found: Sequence[dict[str, Any]], summary: dict[str, Any], live: dict[str, Any]) -> None:
    kinds = {"errors": "as foretold", "errors_at_speed": "at the machine's speed of each run"}
    for kind, words in kinds.items() if summary else ():
        print(f"\n{model}: error, % (± half the spread of the runs), {words}")
        print(table(("", "runs", "slowness", "TTFT P50", "P99", "TPOT P50", "P99", "E2E P50", "tok/s"), [
            (entry["cell"], str(entry["runs"]), f"{statistics.median(entry['slowness']):.2f}",
             *(f"{100 * entry[kind][name]:+.1f} (±{50 * entry['spread'][name]:.0f})" for name in SHOWN))
            for entry in found
        ]))  # fmt: skip
        for metric, figures in summary[kind].items():
            bar, bar95 = BARS[metric]
            print(
                f"{metric}: median {100 * figures['median']:.1f} % (bar {100 * bar:.0f}), P95 "
                f"{100 * figures['p95']:.1f} % (bar {100 * bar95:.0f}); {100 * figures['held']:.0f} % of the figures "
                f"within the larger bar or 1.5 × the spread, whose median is {100 * figures['spread']:.1f} %"
            )
    for kind, one in live.items():
        low, middle50, high = one["measured_over_predicted"]
        print(
            f"{one['steps']} steps, {kind}: measured ÷ predicted P5 {low:.2f}, P50 {middle50:.2f}, P95 {high:.2f}; "
            f"{100 * one['inside_interval']:.0f} % within the interval, its median width "
            f"{100 * one['median_width']:.0f} %, median error {100 * one['median_error']:.1f} %"
        )


def summarise_errors(found: Sequence[dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """By metric: median and P95 of the absolute errors over cells and percentiles, and the share within its bar."""
    summary = {}
    for metric, (_, bar95) in BARS.items():
        values = [
            (abs(value), abs(value) <= max(bar95, 1.5 * entry["spread"][name]))
            for entry in found
            for name, value in entry[kind].items()
            if name.startswith(metric)
        ]
        ordered = sorted(value for value, _ in values)
        held = sum(within for _, within in values) / len(values)
        spread = statistics.median(
            entry["spread"][name] for entry in found for name in entry[kind] if name.startswith(metric)
        )
        summary[metric] = {
            "median": percentile(ordered, 50), "p95": percentile(ordered, 95), "held": held, "spread": spread,
        }  # fmt: skip
    return summary
