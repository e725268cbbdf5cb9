"""A plan in words: what was chosen, what it would give, why it wins and why the others lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from foretell.benchmark.tables import number, table
from foretell.plan.evaluate import TERMS, Outcome
from foretell.plan.goals import Goal, measure_name
from foretell.plan.memory import GIB
from foretell.plan.plan import Plan
from foretell.plan.rank import keeps
from foretell.plan.search import Found
from foretell.plan.space import Candidate

BOUND_WORDS = {
    "weights": "reading the weights: the same for one request as for many",
    "compute": "arithmetic on prompts and batches",
    "KV reads": "reading keys and values of long histories",
    "collectives": "talking between ranks",
    "CPU": "the engine's own work between steps",
    "queue": "waiting to be let in: the load is beyond what it serves",
}
CHOICES: tuple[tuple[str, Callable[[Candidate], Any]], ...] = (
    ("layout", lambda c: f"tp={c.tp} pp={c.pp} replicas={c.replicas}"),
    ("policy", lambda c: c.policy),
    ("sequences", lambda c: c.max_num_seqs),
    ("tokens a step", lambda c: c.max_num_batched_tokens),
    ("prompt chunk", lambda c: c.max_chunk_tokens or "no cap"),
    ("KV share", lambda c: c.kv_share),
    ("prefix cache", lambda c: "on" if c.enable_prefix_caching else "off"),
    ("weights", lambda c: c.weights),
)


def report(plan: Plan) -> Iterator[str]:
    """The whole of it, line by line."""
    found, goal = plan.found, plan.goal
    yield searched(found)
    if plan.winner is None:
        yield "no configuration can be run:"
        yield from (f"  {count} × {reason}" for reason, count in reasons(found)[:5])
        return
    outcome = found.outcomes[plan.winner]
    yield ""
    yield f"winner: {found.candidates[plan.winner]}"
    if plan.profile.get("source") == "analytic":
        yield "by the device's data sheet: nothing of it was measured, or not with requests as long as these"
    yield verdict(goal, outcome)
    yield ""
    yield figures(plan)
    yield ""
    yield f"a request's time: {shares(outcome)}"
    yield f"bound by {outcome.bound}: {BOUND_WORDS[outcome.bound]}"
    yield ""
    yield memory(plan)
    yield ""
    yield "instead of the winner's choice, the best with another one:"
    yield alternatives(plan)
    yield ""
    yield "no other beats these in every way:"
    yield pareto_table(plan)
    yield from why(plan)


def searched(found: Found) -> str:
    kinds = Counter(pruned.kind for pruned in found.pruned.values())
    parts = [f"{len(found.outcomes)} simulated", *(f"{count} {kind}" for kind, count in kinds.most_common())]
    return f"{len(found.candidates):,} configurations: {', '.join(parts)}"


def reasons(found: Found) -> list[tuple[str, int]]:
    """Why configurations were left out, the most frequent first; of kinds with figures in them one example."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for pruned in found.pruned.values():
        alike = pruned.kind in ("too large", "the same run", "worse in every way")
        key = pruned.kind if alike else pruned.reason
        counts[key] += 1
        example.setdefault(key, f"{key}, for one: {pruned.reason}" if alike else key)
    return [(example[key], count) for key, count in counts.most_common()]


def verdict(goal: Goal, outcome: Outcome) -> str:
    if not goal.limits:
        return "no limits were set: it has the highest goodput, and of those the lowest latencies"
    if keeps(goal, outcome):
        return f"keeps every limit, at {100 * goal.ratio(outcome.latencies):.0f} % of the tightest"
    missed = [
        f"{limit.name} is {seconds(value)} where {seconds(limit.seconds)} is wanted"
        for limit, value in zip(goal.limits, outcome.latencies, strict=False)
        if value > limit.seconds
    ]
    return f"NO configuration keeps the limits; this one has the highest goodput: {'; '.join(missed)}"


def seconds(value: float) -> str:
    return f"{number(1e3 * value)} ms" if value < 1 else f"{number(value)} s"


def figures(plan: Plan) -> str:
    """Predicted, between the ends of the profile's interval."""
    rows = []
    for name, value, low, high in plan.predicted():
        shown: Callable[[float], str] = seconds if name.endswith(" s") else number
        rows.append((name.removesuffix(" s"), shown(value), f"{shown(low)} … {shown(high)}"))
    return table(("predicted", "", "interval"), rows)


def shares(outcome: Outcome) -> str:
    ordered = sorted(TERMS, key=lambda term: -outcome.terms[term])
    return ", ".join(f"{term} {100 * outcome.terms[term]:.0f} %" for term in ordered if outcome.terms[term] >= 0.005)


def memory(plan: Plan) -> str:
    held = plan.found.ledgers[plan.winner or 0]
    rows = [(name, f"{size / GIB:.2f}") for name, size in held.entries.items()]
    rows.append(("planned", f"{held.planned_bytes / GIB:.2f}"))
    rows.append(("may be used", f"{held.budget_bytes / GIB:.2f}"))
    return table(("memory of the fullest device", "GiB"), rows)


def alternatives(plan: Plan) -> str:
    """For every choice and every other value of it, the best configuration that has it, beside the winner."""
    rows = []
    for name, value, index in differing(plan):
        outcome = plan.found.outcomes[index]
        row = (f"{name}: {value}", number(outcome.goodput), *(seconds(v) for v in outcome.latencies))
        rows.append((*row, _ratio(plan.goal, outcome), outcome.bound))
    names = [measure_name(*measure) for measure in plan.goal.measures]
    return table(("", "goodput/s", *names, "of the limits", "bound"), rows) if rows else "nothing else was simulated"


def _ratio(goal: Goal, outcome: Outcome) -> str:
    return f"{100 * goal.ratio(outcome.latencies):.0f} %" if goal.limits else "–"


def pareto_table(plan: Plan) -> str:
    rows = []
    for index in plan.pareto[:12]:
        outcome, candidate = plan.found.outcomes[index], plan.found.candidates[index]
        mark = "→ " if index == plan.winner else "  "
        row = (f"{mark}{short(candidate)}", number(outcome.goodput), *(seconds(v) for v in outcome.latencies))
        rows.append((*row, outcome.bound))
    names = [measure_name(*measure) for measure in plan.goal.measures]
    return table(("", "goodput/s", *names, "bound"), rows)


def differing(plan: Plan) -> list[tuple[str, Any, int]]:
    """The alternatives that are not the winner's own run."""
    return [row for row in plan.alternatives(CHOICES) if row[2] != plan.winner]


def short(candidate: Candidate) -> str:
    chunk = f", chunks of {candidate.max_chunk_tokens}" if candidate.max_chunk_tokens else ""
    return (
        f"tp={candidate.tp} pp={candidate.pp} ×{candidate.replicas}, {candidate.policy}, "
        f"{candidate.max_num_seqs} sequences, {candidate.max_num_batched_tokens} tokens{chunk}"
    )


def why(plan: Plan) -> list[str]:
    """Why the winner wins, and why the best of the others lose, in sentences."""
    if plan.winner is None:
        return []
    best = plan.found.outcomes[plan.winner]
    lines = []
    for name, value, index in differing(plan):
        lines.append(f"{name} {value} {_difference(plan.goal, best, plan.found.outcomes[index])}")
    same: dict[str, list[str]] = {}
    for name, value, index in plan.alternatives(CHOICES):
        if index == plan.winner:
            same.setdefault(name, []).append(str(value))
    lines += [f"{name} {', '.join(values)} would be the same run" for name, values in same.items()]
    return lines


def _difference(goal: Goal, best: Outcome, other: Outcome) -> str:
    """What is worse about the other one, the weightiest first."""
    measures = [measure_name(*measure) for measure in goal.measures]
    broken = [
        f"breaks {limit.name} ({seconds(value)}, {seconds(limit.seconds)} allowed)"
        for limit, value in zip(goal.limits, other.latencies, strict=False)
        if value > limit.seconds
    ]
    bound = f"bound by {other.bound}"
    if broken and keeps(goal, best):
        return f"{broken[0]}: {bound}, {_grown(best, other)}"
    if other.goodput < 0.99 * best.goodput:
        return (
            f"loses {100 * (1 - other.goodput / best.goodput):.0f} % of the goodput: {bound}, {_grown(best, other)}"
        )
    worse = [
        (b / a, name)
        for a, b, name in zip(best.latencies, other.latencies, measures, strict=True)
        if a > 0 and b > 1.01 * a
    ]
    if not worse:
        return "is as good"
    factor, name = max(worse)
    return f"has {100 * (factor - 1):.0f} % more {name}: {bound}, {_grown(best, other)}"


def _grown(best: Outcome, other: Outcome) -> str:
    """The term whose share of a request's time grew most."""
    term = max(TERMS, key=lambda name: other.terms[name] - best.terms[name])
    return f"{term} {100 * best.terms[term]:.0f} → {100 * other.terms[term]:.0f} % of its time"
