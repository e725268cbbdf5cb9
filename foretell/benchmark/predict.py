"""`foretell simulate`: the engine's own scheduler on a calibrated cost model, in virtual time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from foretell.benchmark.latency import goodput_line, latency_table, offered_load
from foretell.benchmark.online_report import trade_off
from foretell.benchmark.simulate import simulate
from foretell.benchmark.tables import number
from foretell.config import PolicyName, SchedulerConfig
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.trace.metrics import Objectives, Report, summarize
from foretell.trace.workloads import Workload

Say = Callable[[str], None]


def run(
    profile: Profile,
    workload: Workload,
    config: SchedulerConfig,
    num_blocks: tuple[int, ...],
    *,
    policies: Sequence[PolicyName],
    objectives: Objectives,
    say: Say,
) -> dict[str, Any]:
    """Predicted latencies of every policy on the same arrivals; what goes into the JSON line."""
    say(f"{profile.model}, {profile.weight_format} weights, on {profile.hardware} ({profile.created[:10]})")
    say(f"workload {workload.name}: {workload.description}; offered: {offered_load(workload)}")
    low, high = f"{100 * (profile.low - 1):+.0f}", f"{100 * (profile.high - 1):+.0f}"
    say(f"a step is within {low} … {high} % of its prediction nine times in ten, by held-out steps")
    reports: dict[PolicyName, Report] = {}
    figures: dict[str, Any] = {}
    for policy in policies:
        cost, started = StepCost(profile), time.perf_counter()
        windows = [group.window for group in profile.spec.kv_groups]
        found = simulate(workload, profile.spec.vocab_size, replace(config, policy=policy), num_blocks, windows, cost)
        wall = time.perf_counter() - started
        report = reports[policy] = summarize(found.requests, objectives)
        say(f"\n{policy}")
        say(latency_table(report))
        say(
            f"{number(report.requests_per_second)} requests/s, {number(report.output_tokens_per_second)} output "
            f"tok/s; preemptions {report.preemptions}"
        )
        say(
            f"{found.steps:,} steps, {number(found.seconds)} s of virtual time in {number(wall)} s: "
            f"{number(found.seconds / wall)} times as fast as it would be"
        )
        if objectives.any:
            say(goodput_line(report))
        beyond = cost.beyond / max(1, cost.steps)
        if beyond > 0.01:
            say(f"warning: {100 * beyond:.0f} % of the steps lie beyond what was measured; their figures are guesses")
        figures[policy] = {**report.as_dict(), "steps": found.steps, "beyond_share": beyond, "wall_seconds": wall}
    say(trade_off(reports, objectives))
    return {
        "bench": "simulate",
        "model": profile.model,
        "hardware": profile.hardware,
        "calibrated": profile.created,
        "workload": workload.name,
        "requests": len(workload.requests),
        "objectives": asdict(objectives),
        "step_interval": [profile.low, profile.high],
        "predicted": figures,
    }
