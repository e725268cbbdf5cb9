"""Latencies and rates as words, whoever was measured: an engine in this process or a server elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from foretell.benchmark.tables import milliseconds, number, table
from foretell.trace.metrics import Report, Spread
from foretell.trace.workloads import Workload

METRICS = {
    "ttft_seconds": "TTFT",
    "tpot_seconds": "TPOT",
    "itl_seconds": "ITL",
    "e2e_seconds": "E2E",
    "queue_seconds": "queue",
}
COLUMNS = {"mean": "mean", "std": "std", "min": "min", "p50": "P50", "p90": "P90", "p99": "P99", "max": "max"}
SHORT = ("mean", "p50", "p90", "p99")
LATE_SHARE = 0.1  # of the median TTFT: a generator later than that measures itself


def latency_table(
    report: Report, beside: Mapping[str, Report] | None = None, columns: tuple[str, ...] = SHORT
) -> str:
    """A row per metric in milliseconds; at the right the medians of other reports (a floor, a prediction)."""
    others = beside or {}
    rows = []
    for name, label in METRICS.items():
        spread: Spread = getattr(report, name)
        if spread.count:
            measured = [milliseconds(getattr(spread, column)) for column in columns]
            rows.append([label, *measured, *(milliseconds(getattr(other, name).p50) for other in others.values())])
    header = ["ms", *(COLUMNS[column] for column in columns), *(f"{name} P50" for name in others)]
    return table(header, rows)


def offered_load(workload: Workload) -> str:
    seconds = workload.requests[-1].arrival_seconds
    if seconds <= 0:
        return "everything at once"
    return (
        f"{number(len(workload.requests) / seconds)} requests/s over {number(seconds)} s, "
        f"{number(workload.prompt_tokens / seconds)} prompt and "
        f"{number(workload.output_tokens / seconds)} output tok/s"
    )


def goodput_line(report: Report) -> str:
    return (
        f"goodput: {number(report.goodput_per_second)} requests/s met every objective "
        f"({100 * report.good_share:.0f} % of all)"
    )


def lateness_line(lateness: Spread, report: Report) -> str:
    line = f"generator late by mean {milliseconds(lateness.mean)}, P99 {milliseconds(lateness.p99)} ms"
    if lateness.p99 > LATE_SHARE * report.ttft_seconds.p50:
        line += ": it could not keep its times, so latencies include its own delay"
    return line
