"""The online benchmark's words: theory, tables, the policies' trade-off, two small plots, one JSON object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from foretell.benchmark.beside import comparison, errors, foretold, live_line, profile_of
from foretell.benchmark.latency import goodput_line, latency_table, lateness_line, offered_load
from foretell.benchmark.online import OnlineRun, run_open_loop, set_policy
from foretell.benchmark.setup import Subject, describe, heading, subject_after, subject_of
from foretell.benchmark.steps import Record, summarize_steps
from foretell.benchmark.tables import BARS, cdf_rows, milliseconds, number, sparkline, timeline
from foretell.config import PolicyName
from foretell.trace.metrics import Objectives, Report, Spread, span_seconds, summarize
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.async_llm import AsyncLLM

Say = Callable[[str], None]
TRADE_OFF = {
    "prefill-first": "new prompts go first: short TTFT, while running decodes wait",
    "decode-first": "running decodes go first: steady TPOT, while new prompts wait",
    "mixed": "decodes go first and prompt chunks fill the rest of each step",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """All rounds of one policy: a report over them all, and the last round for the plots."""

    report: Report
    lateness: Spread
    last: OnlineRun


def run(
    llm: AsyncLLM,
    workload: Workload,
    *,
    policies: Sequence[PolicyName],
    objectives: Objectives,
    repeat: int,
    warmup: int,
    say: Say,
    progress: bool = False,
) -> dict[str, Any]:
    """Theory, then ``repeat`` rounds of every policy in turn on the same arrivals; what goes into the JSON line."""
    subject = subject_of(llm.llm)
    subject.check(workload)
    kernels = llm.llm.assembly.kernels
    heading(subject, workload, kernels, say)
    say(f"offered: {offered_load(workload)}")
    floors = _floors(subject, workload, policies, objectives)
    for policy, floor in floors.items():
        say(f"floor, {policy}: {_one_line(floor)}")
    if warmup:
        run_open_loop(llm, _warmup_part(workload, warmup), variant=1)
    outcomes = _rounds(llm, workload, policies, objectives, repeat, progress)
    better = subject_after(llm.llm, subject, say)
    if better is not subject:
        subject, floors = better, _floors(better, workload, policies, objectives)
    predicted = _foretold(llm, subject, workload, policies, objectives)
    for policy in policies:
        say_outcome(policy, floors[policy], outcomes[policy], objectives, say)
        if policy in predicted:
            say(comparison(predicted[policy], outcomes[policy].report))
    if line := live_line(llm.llm.assembly.engine.stats()["prediction"]):
        say(line)
    say(trade_off({policy: outcome.report for policy, outcome in outcomes.items()}, objectives))
    return {
        "bench": "online",
        **describe(subject, workload, kernels),
        "policies": list(policies),
        "rounds": repeat,
        "objectives": asdict(objectives),
        "floor": {policy: floor.as_dict() for policy, floor in floors.items()},
        "measured": {policy: outcome.report.as_dict() for policy, outcome in outcomes.items()},
        "predicted": {policy: report.as_dict() for policy, report in predicted.items()},
        "prediction_errors": {
            policy: errors(report, outcomes[policy].report) for policy, report in predicted.items()
        },
        "generator_lateness_seconds": {policy: asdict(outcome.lateness) for policy, outcome in outcomes.items()},
        "steps": {policy: summarize_steps(outcome.last.steps).as_dict() for policy, outcome in outcomes.items()},
    }


def run_virtual(
    subject: Subject, workload: Workload, *, policies: Sequence[PolicyName], objectives: Objectives, say: Say
) -> dict[str, Any]:
    """The same arrivals in virtual time, each step at its floor: no weights, no waiting."""
    subject.check(workload)
    heading(subject, workload, "no", say)
    say(f"offered: {offered_load(workload)}")
    say("virtual time: every step takes its floor, so these are bounds, not predictions")
    runs = {policy: subject.floor(workload, policy=policy) for policy in policies}
    reports = {policy: summarize(virtual.requests, objectives) for policy, virtual in runs.items()}
    for policy, report in reports.items():
        say(f"\n{policy}: {_one_line(report)}")
        say(latency_table(report))
        if objectives.any:
            say(goodput_line(report))
    say(trade_off(reports, objectives))
    return {
        "bench": "online-virtual",
        **describe(subject, workload, "none"),
        "policies": list(policies),
        "objectives": asdict(objectives),
        "virtual": {policy: report.as_dict() for policy, report in reports.items()},
        "steps": {policy: virtual.steps for policy, virtual in runs.items()},
    }


def _floors(
    subject: Subject, workload: Workload, policies: Sequence[PolicyName], objectives: Objectives
) -> dict[PolicyName, Report]:
    runs = {policy: subject.floor(workload, policy=policy) for policy in policies}
    return {policy: summarize(run.requests, objectives) for policy, run in runs.items()}


def _foretold(
    llm: AsyncLLM, subject: Subject, workload: Workload, policies: Sequence[PolicyName], objectives: Objectives
) -> dict[PolicyName, Report]:
    """What this machine's calibration says of the same traffic; empty where there is none."""
    profile = profile_of(llm.llm)
    if profile is None:
        return {}
    found = {}
    for policy in policies:
        config = replace(subject.config, policy=policy)
        virtual = foretold(profile, subject.spec, config, subject.num_blocks, workload)
        if virtual is not None:
            found[policy] = summarize(virtual.requests, objectives)
    return found


def _rounds(
    llm: AsyncLLM,
    workload: Workload,
    policies: Sequence[PolicyName],
    objectives: Objectives,
    repeat: int,
    progress: bool,
) -> dict[PolicyName, Outcome]:
    """A B C A B C …: whatever drifts in the machine meets every policy alike."""
    from foretell.progress import generation_bar

    runs: dict[PolicyName, list[OnlineRun]] = {policy: [] for policy in policies}
    variant = 1
    total = len(workload.requests) * len(policies) * repeat
    with generation_bar(total) if progress else nullcontext() as advance:
        for _ in range(repeat):
            for policy in policies:
                variant += 1
                set_policy(llm, policy)
                runs[policy].append(run_open_loop(llm, workload, variant=variant, advance=advance))
    return {policy: _outcome(own, objectives) for policy, own in runs.items()}


def _outcome(runs: Sequence[OnlineRun], objectives: Objectives) -> Outcome:
    requests = [request for one in runs for request in one.requests]
    seconds = sum(span_seconds(one.requests) for one in runs)
    worst = max((one.lateness for one in runs), key=lambda spread: spread.p99)
    return Outcome(summarize(requests, objectives, seconds), worst, runs[-1])


def _warmup_part(workload: Workload, count: int) -> Workload:
    """The first of its requests, at once and short."""
    first = (replace(r, arrival_seconds=0.0, output_len=min(4, r.output_len)) for r in workload.requests[:count])
    return replace(workload, requests=tuple(first))


# -- words ------------------------------------------------------------------------------------------------


def _one_line(report: Report) -> str:
    return (
        f"TTFT P50 {milliseconds(report.ttft_seconds.p50)} ms, TPOT P50 {milliseconds(report.tpot_seconds.p50)} ms, "
        f"{number(report.output_tokens_per_second)} output tok/s"
    )


def say_outcome(policy: PolicyName, floor: Report, outcome: Outcome, objectives: Objectives, say: Say) -> None:
    report, lateness = outcome.report, outcome.lateness
    say(f"\n{policy}: {TRADE_OFF[policy]}")
    say(latency_table(report, {"floor": floor}))
    say(
        f"served {report.requests - report.failed} of {report.requests}; "
        f"{number(report.requests_per_second)} requests/s, {number(report.prompt_tokens_per_second)} prompt and "
        f"{number(report.output_tokens_per_second)} output tok/s; preemptions {report.preemptions}; "
        f"{report.cached_tokens:,} prompt tokens from the prefix cache"
    )
    if objectives.any:
        say(goodput_line(report))
    say(lateness_line(lateness, report))
    for line in plots(outcome.last):
        say(line)


def plots(run_: OnlineRun) -> list[str]:
    """Running and waiting requests over time, and how TTFT is distributed."""
    seconds = max((t for r in run_.requests for t in r.token_times), default=0.0)
    lines = [f"requests over {number(seconds)} s (highest in each slice, {BARS[-1]} = the number at the right)"]
    for name in ("running", "waiting"):
        values = timeline([(record["started"], _count(record, name)) for record in run_.steps], seconds)
        lines.append(f"  {name:8}│{sparkline(values)}│ {max(values):.0f}")
    lines.append("TTFT, by percentile")
    lines += [f"  {row}" for row in cdf_rows([r.ttft_seconds for r in run_.requests if r.served])]
    return lines


def _count(record: Record, name: str) -> float:
    return float(record[name])


def trade_off(reports: Mapping[PolicyName, Report], objectives: Objectives) -> str:
    """What the choice of the policy buys and costs, in one line."""
    if len(reports) == 1:
        policy = next(iter(reports))
        return f"\ntrade-off: {policy} means that {TRADE_OFF[policy]}; --compare-policies runs all three"

    def best(value: Callable[[Report], float]) -> PolicyName:
        return min(reports, key=lambda policy: value(reports[policy]))

    ttft, tpot = best(lambda r: r.ttft_seconds.p90), best(lambda r: r.tpot_seconds.p90)
    text = (
        f"\ntrade-off at P90: shortest TTFT {ttft} ({milliseconds(reports[ttft].ttft_seconds.p90)} ms), "
        f"shortest TPOT {tpot} ({milliseconds(reports[tpot].tpot_seconds.p90)} ms)"
    )
    if objectives.any:
        good = best(lambda r: -r.goodput_per_second)
        text += f", most goodput {good} ({number(reports[good].goodput_per_second)} requests/s)"
    fast = best(lambda r: -r.output_tokens_per_second)
    return text + f", most output {fast} ({number(reports[fast].output_tokens_per_second)} tok/s)"
