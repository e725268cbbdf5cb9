"""The search: prune, simulate what is left on all cores, and prune again by what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from foretell.cost.grid import BeyondProfileError
from foretell.plan.evaluate import Outcome, evaluate
from foretell.plan.memory import Ledger, ledger
from foretell.plan.problem import Problem
from foretell.plan.prune import Bounds, bounds, dominated, illegal, same_run
from foretell.plan.space import Candidate
from foretell.plan.workers import Workers

Report = Callable[[int, int, str], None]  # configurations settled, in all, what is being done
KINDS = ("impossible", "too large", "beyond the profile", "the same run", "worse in every way", "not simulated")


@dataclass(frozen=True, slots=True)
class Pruned:
    """A configuration that was not simulated. ``like``: the index of the one it would equal or lose to."""

    index: int
    kind: str  # one of KINDS
    reason: str
    like: int | None = None


@dataclass(slots=True)
class Found:
    """Of each candidate, by index: its ledger where it fits, and its outcome or why there is none."""

    candidates: list[Candidate]
    ledgers: dict[int, Ledger] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    pruned: dict[int, Pruned] = field(default_factory=dict)

    @property
    def settled(self) -> int:
        return len(self.outcomes) + len(self.pruned)


def search(
    problem: Problem,
    candidates: Sequence[Candidate],
    *,
    processes: int = 1,
    most: int | None = None,
    exhaustive: bool = False,
    report: Report = lambda done, total, what: None,
) -> Found:
    """``exhaustive``: simulate everything that fits, to check the rest against. ``most``: simulate no more than so
    many, from all over the space; the others are listed as not simulated."""
    found = Found(list(candidates))
    _check(problem, found)
    report(found.settled, len(candidates), "what fits")
    pruner = None if exhaustive else _Pruner(problem, found)
    with Workers(lambda index: _run(problem, found, index), processes) as workers:
        waiting = iter(_in_order(found, spread=most is not None))
        begun = 0
        for index in _next(waiting, pruner, found):
            if most is not None and begun >= most:
                found.pruned[index] = Pruned(
                    index, "not simulated", f"{most} were simulated, as many as were asked for"
                )
                continue
            begun += 1
            workers.submit(index)
            if workers.is_full:
                _take(found, *workers.result())
                report(found.settled, len(candidates), str(found.candidates[index].policy))
        while workers.busy:
            _take(found, *workers.result())
            report(found.settled, len(candidates), "the last ones")
    return found


def _in_order(found: Found, *, spread: bool) -> list[int]:
    """What is left, the plain first; ``spread``: from all over the space, so that a part has some of everything."""
    left = [i for i in range(len(found.candidates)) if i not in found.pruned]
    if spread:
        Random(0).shuffle(left)
    return left


def _next(waiting: Iterator[int], pruner: _Pruner | None, found: Found) -> Iterator[int]:
    for index in waiting:
        reason = None if pruner is None else pruner.reason(index)
        if reason is None:
            yield index
        else:
            found.pruned[index] = reason


def _check(problem: Problem, found: Found) -> None:
    """Leave out what cannot be run, or does not fit."""
    for index, candidate in enumerate(found.candidates):
        if reason := illegal(problem, candidate):
            found.pruned[index] = Pruned(index, "impossible", reason)
            continue
        held = ledger(problem, candidate)
        if isinstance(held, str):
            found.pruned[index] = Pruned(index, "too large", held)
        else:
            found.ledgers[index] = held


def _run(problem: Problem, found: Found, index: int) -> Outcome | str:
    """The outcome, or why there is none."""
    try:
        return evaluate(problem, found.candidates[index], found.ledgers[index].num_blocks)
    except BeyondProfileError as error:
        return str(error)


def _take(found: Found, index: int, result: Outcome | str) -> None:
    if isinstance(result, str):
        found.pruned[index] = Pruned(index, "beyond the profile", result)
    else:
        found.outcomes[index] = result


class _Pruner:
    """Compares a candidate with everything that was simulated before it."""

    def __init__(self, problem: Problem, found: Found) -> None:
        self.problem, self.found = problem, found
        self._bounds: dict[object, Bounds] = {}

    def reason(self, index: int) -> Pruned | None:
        found, candidate = self.found, self.found.candidates[index]
        blocks = found.ledgers[index].num_blocks
        for other, outcome in found.outcomes.items():
            held = found.ledgers[other].num_blocks
            why = same_run(self.problem, candidate, blocks, found.candidates[other], held, outcome)
            if why:
                return Pruned(index, "the same run", why, other)
        best = self.bounds(candidate)
        for other, outcome in found.outcomes.items():
            if dominated(best, candidate.ranks, outcome, found.candidates[other].ranks):
                return Pruned(index, "worse in every way", self._words(best, outcome), other)
        return None

    def bounds(self, candidate: Candidate) -> Bounds:
        """Computed once for all that have the same limits: policies and chunks change nothing here."""
        key = (
            candidate.weights, candidate.layout, candidate.max_num_seqs, candidate.max_num_batched_tokens,
            candidate.enable_prefix_caching,
        )  # fmt: skip
        if key not in self._bounds:
            self._bounds[key] = bounds(self.problem, candidate)
        return self._bounds[key]

    def _words(self, best: Bounds, outcome: Outcome) -> str:
        return f"goodput at most {best.goodput:.3g}/s, where {outcome.goodput:.3g}/s was found, and no latency better"
