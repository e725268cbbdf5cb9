"""Who wins, and the Pareto set: what nothing else beats in every way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from foretell.plan.evaluate import Outcome
from foretell.plan.goals import Goal
from foretell.plan.search import Found
from foretell.plan.space import Candidate

NEARLY = 0.99  # of the best goodput is as good as the best: what is left decides by latency


def keeps(goal: Goal, outcome: Outcome) -> bool:
    """Whether all limits are kept."""
    return goal.ratio(outcome.latencies) <= 1


def ranking(goal: Goal, found: Found) -> list[int]:
    """Indices of all that were simulated, the winner first.

    Those that keep all limits come before the others. Then by the objective: ``goodput`` takes the highest, and of
    those within 1 % of it the one that stays farthest below its limits; ``latency`` that one at once; ``cost`` the
    fewest devices, and of those as for goodput. Where nothing keeps the limits, goodput decides. Equal ones: the
    plainer, which is the first.
    """
    outcomes = found.outcomes
    kept = [i for i, outcome in outcomes.items() if keeps(goal, outcome)]
    rest = [i for i in outcomes if i not in set(kept)]
    if goal.objective == "latency":
        kept.sort(key=lambda i: (_slack(goal, outcomes[i]), found.candidates[i].ranks, i))
        return kept + _by_goodput(goal, found, rest)
    if goal.objective == "goodput":
        return _by_goodput(goal, found, kept) + _by_goodput(goal, found, rest)
    ordered: list[int] = []
    for devices in sorted({found.candidates[i].ranks for i in kept}):
        ordered += _by_goodput(goal, found, [i for i in kept if found.candidates[i].ranks == devices])
    return ordered + _by_goodput(goal, found, rest)


def _by_goodput(goal: Goal, found: Found, indices: Sequence[int]) -> list[int]:
    """The best of those that are left, again and again."""
    best = max((found.outcomes[i].goodput for i in indices), default=0.0)
    near = [i for i in indices if found.outcomes[i].goodput >= NEARLY * best]
    others = sorted((i for i in indices if i not in set(near)), key=lambda i: (-found.outcomes[i].goodput, i))
    near.sort(key=lambda i: (_slack(goal, found.outcomes[i]), found.candidates[i].ranks, i))
    return near + others


def _slack(goal: Goal, outcome: Outcome) -> tuple[float, ...]:
    """How near the limits it is; without limits, its latencies."""
    return (goal.ratio(outcome.latencies), *outcome.latencies) if goal.limits else outcome.latencies


def settle_on_the_plain(found: Found, winner: int) -> int:
    """The plainest of those that are the same run as the winner, in its place among what was simulated."""
    equals = [p for p in found.pruned.values() if p.kind == "the same run" and p.like == winner]
    plain = min((p.index for p in equals), default=winner)
    if plain >= winner:
        return winner
    found.outcomes[plain] = found.outcomes.pop(winner)
    for pruned in equals:
        found.pruned[pruned.index] = replace(pruned, like=plain)
    found.pruned[winner] = replace(found.pruned.pop(plain), index=winner)
    return plain


def pareto(found: Found) -> list[int]:
    """Indices that no other one beats: at least as good in goodput, every latency and devices, better in one."""

    def point(index: int) -> tuple[float, ...]:
        outcome = found.outcomes[index]
        return (-outcome.goodput, *outcome.latencies, float(found.candidates[index].ranks))

    points = {index: point(index) for index in found.outcomes}
    first_of: dict[tuple[float, ...], int] = {}
    for index in sorted(points):
        first_of.setdefault(points[index], index)
    unique = sorted(first_of.values())
    return [i for i in unique if not any(_beats(points[j], points[i]) for j in unique)]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def with_equals(found: Found, order: Sequence[int]) -> list[tuple[int, int]]:
    """(index, index of its outcome) of all that is known, the best first: behind what was simulated, those that would
    have been the same run."""
    equals: dict[int, list[int]] = {}
    for pruned in found.pruned.values():
        if pruned.kind == "the same run" and pruned.like is not None:
            equals.setdefault(pruned.like, []).append(pruned.index)
    return [(index, of) for of in order for index in (of, *equals.get(of, ()))]


def best_with(found: Found, order: Sequence[int], key: Callable[[Candidate], Any]) -> Mapping[Any, int]:
    """Of each value of a choice, the best configuration that has it: the index of its outcome."""
    best: dict[Any, int] = {}
    for index, outcome in with_equals(found, order):
        best.setdefault(key(found.candidates[index]), outcome)
    return best
