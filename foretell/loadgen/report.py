"""The load generator's words, and its JSON object."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from foretell.benchmark.latency import (
    COLUMNS,
    goodput_line,
    latency_table,
    lateness_line,
)
from foretell.benchmark.tables import milliseconds, number
from foretell.loadgen.drive import INTERRUPTED, Pace, Run, Sent
from foretell.trace.metrics import Objectives, Report, Spread, summarize

Say = Callable[[str], None]
BUSY_SHARE = 0.7  # of one core: beyond that, what is measured may be the generator
LATE_SECONDS = 0.010


def finished(run: Run) -> list[Sent]:
    """All but those that Ctrl-C cut off, which say nothing of the server."""
    return [sent for sent in run.sent if sent.kind != INTERRUPTED]


def report_of(run: Run, objectives: Objectives) -> Report:
    return summarize([sent.times() for sent in finished(run)], objectives)


def say_run(run: Run, report: Report, pace: Pace, objectives: Objectives, say: Say) -> None:
    done = finished(run)
    say("")
    say(latency_table(report, columns=tuple(COLUMNS)))
    say(
        f"served {report.requests - report.failed} of {report.requests} in {number(report.duration_seconds)} s: "
        f"{number(report.requests_per_second)} requests/s, {number(report.prompt_tokens_per_second)} prompt and "
        f"{number(report.output_tokens_per_second)} output tok/s"
    )
    if objectives.any:
        say(goodput_line(report))
    say(token_line(done, report))
    for line in error_lines(done):
        say(line)
    if run.interrupted:
        say(f"interrupted: {len(run.sent) - len(done)} requests were still open and are left out of all figures")
    say(generator_line(run, report, pace))
    if run.busy_share > BUSY_SHARE:
        say(
            f"WARNING: the generator used {100 * run.busy_share:.0f} % of the one core it can use, so it may be what "
            "was measured: lower the rate, or share the load among several of it"
        )


def token_line(done: list[Sent], report: Report) -> str:
    """Who counted the tokens, and whether pieces hold more than one of them."""
    counted = sum(sent.usage.completion_tokens is not None for sent in done if sent.kind is None)
    served = report.requests - report.failed
    pieces = sum(len(sent.reader.token_times) for sent in done if sent.kind is None)
    if not served:
        return "tokens: none"
    if counted == 0:
        return f"tokens: {pieces:,} by chunks (the server sends no usage), one each"
    who = "by the server's usage" if counted == served else f"by the server's usage in {counted} of {served}"
    asked = sum(sent.prompt_len for sent in done if sent.kind is None)
    line = f"tokens: {who}; {report.prompt_tokens:,} of prompts ({asked:,} asked), {report.output_tokens:,} of output"
    if pieces and abs(report.output_tokens / pieces - 1) > 0.01:
        line += f", {report.output_tokens / pieces:.2f} per chunk (ITL is between chunks)"
    if report.cached_tokens:
        line += f"; {report.cached_tokens:,} prompt tokens from its cache"
    return line


def error_lines(done: list[Sent]) -> list[str]:
    """Each kind with its number and the first message of it."""
    kinds: dict[str, list[Sent]] = {}
    for sent in done:
        if sent.kind is not None:
            kinds.setdefault(sent.kind, []).append(sent)
    ranked = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [f"not served, {kind}: {len(found)} ({found[0].detail[:160]})" for kind, found in ranked]


def client_wait(done: list[Sent]) -> Spread:
    """From when a request was due to when it was sent: for room under --max-concurrency."""
    return Spread.of(sent.sent - sent.due for sent in done if not math.isnan(sent.sent))


def generator_line(run: Run, report: Report, pace: Pace) -> str:
    if pace.closed:
        line = "closed loop: a request counts from when its user was free to send it"
    else:
        late = sum(sent.sent - sent.due > LATE_SECONDS for sent in run.sent)
        line = lateness_line(run.lateness, report)
        if pace.max_concurrency is None:
            line += f"; {late} of {len(run.sent)} sent over {LATE_SECONDS * 1e3:g} ms late"
        else:
            wait = client_wait(finished(run))
            line += f"; for room here they waited P50 {milliseconds(wait.p50)}, P99 {milliseconds(wait.p99)} ms"
    return f"{line}; {100 * run.busy_share:.0f} % of one core, {run.connections} connections opened"


def as_dict(run: Run, report: Report) -> dict[str, Any]:
    done = finished(run)
    counted = sum(sent.usage.completion_tokens is not None for sent in done if sent.kind is None)
    served = report.requests - report.failed
    return {
        "measured": report.as_dict(),
        "errors": {kind: count for kind, count in run.errors().items() if kind != INTERRUPTED},
        "interrupted": run.interrupted,
        "token_counts": "chunks" if not counted else "usage" if counted == served else "mixed",
        "chunks": sum(len(sent.reader.token_times) for sent in done if sent.kind is None),
        "generator": {
            "lateness_seconds": asdict(run.lateness) if run.lateness.count else None,
            "client_wait_seconds": asdict(client_wait(done)) if done else None,
            "busy_share": run.busy_share,
            "cpu_seconds": run.cpu_seconds,
            "wall_seconds": run.wall_seconds,
            "connections_opened": run.connections,
        },
    }


def records(run: Run) -> list[dict[str, Any]]:
    """Everything about every request; times in seconds on the run's clock."""
    return [
        {
            "index": sent.index,
            "due": sent.due,
            "sent": None if math.isnan(sent.sent) else sent.sent,
            "ended": sent.ended,
            "prompt_tokens_asked": sent.prompt_len,
            "output_tokens_asked": sent.output_len,
            "prompt_tokens": sent.usage.prompt_tokens,
            "output_tokens": sent.usage.completion_tokens,
            "status": sent.status or None,
            "finish_reason": sent.reader.finish_reason,
            "error": sent.kind,
            "detail": sent.detail or None,
            "chunk_times": list(sent.reader.token_times),
        }
        for sent in run.sent
    ]
