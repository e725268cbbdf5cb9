"""How fast configurations are simulated: requests of a conversation trace through many of them, none left out.

    python bench/plan_speed.py MODEL --trace FILE [--devices h200] [--requests 1000] [--configurations 100]
        [--time-scales 1 0.5 0.2] [--check 3] [--profile NAME] [--seed 1]

MODEL is a name or a folder; a config.json is enough. The configurations are drawn from everything that the planner
would look at there and that fits; each is simulated whole, as the planner does it, on all cores (no pruning, so no
configuration is spared for what another one showed). Theory first: the floor is the bar's time. ``--check`` simulates
some of them once more step by step, and compares every batch, block table entry, and request. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.fast_forward import FastEngine
from foretell.core.group import GroupBatch, Together
from foretell.core.lockstep import LockstepScheduler
from foretell.core.messages import Batch, Chunk, Turn
from foretell.core.scheduler import Scheduler
from foretell.cpus import usable_cpus
from foretell.executor.lockstep import LockstepExecutor
from foretell.executor.virtual import VirtualExecutor
from foretell.plan import fleet
from foretell.plan.command import PlanAsked, make_problem
from foretell.plan.evaluate import Outcome, evaluate, executor_of
from foretell.plan.memory import Ledger, ledger
from foretell.plan.problem import Problem
from foretell.plan.prune import illegal
from foretell.plan.space import Candidate, candidates, usual_choices
from foretell.plan.workers import Workers

BAR_SECONDS = 30.0  # on two cores, for 100 configurations of 1,000 requests


def drawn(problem: Problem, count: int, seed: int) -> list[tuple[Candidate, Ledger]]:
    """That many of all configurations that can be run and fit, from all over the space."""
    space = candidates(usual_choices(problem.machine, tuple(problem.profiles)))
    random.Random(seed).shuffle(space)
    found = []
    for candidate in space:
        held = "" if illegal(problem, candidate) else ledger(problem, candidate)
        if isinstance(held, Ledger):
            found.append((candidate, held))
        if len(found) == count:
            break
    return found


def measured(
    problem: Problem, chosen: list[tuple[Candidate, Ledger]], processes: int
) -> tuple[float, float, list[Outcome]]:
    """(wall seconds, CPU seconds, outcomes) of simulating all of them, starting the processes included."""
    outcomes: dict[int, Outcome | str] = {}
    before = _cpu_seconds()
    began = time.perf_counter()
    with Workers(lambda i: evaluate(problem, chosen[i][0], chosen[i][1].num_blocks), processes) as workers:
        for index in range(len(chosen)):
            workers.submit(index)
            if workers.is_full:
                at, outcome = workers.result()
                outcomes[at] = outcome
        while workers.busy:
            at, outcome = workers.result()
            outcomes[at] = outcome
    seconds = time.perf_counter() - began
    return (
        seconds,
        _cpu_seconds() - before,
        [outcome for _, outcome in sorted(outcomes.items()) if isinstance(outcome, Outcome)],
    )


def _cpu_seconds() -> float:
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, whose))


# -- with and without fast-forward ------------------------------------------------------------------------------


class Digest:
    """Of batches: every chunk of every one, in order, with the blocks it takes."""

    def __init__(self) -> None:
        self.hash, self.batches = blake2b(digest_size=16), 0

    def add(self, chunks: Iterable[Chunk]) -> None:
        self.batches += 1
        told = [(c.request_id, c.start, c.length, c.new_block_ids, c.sample) for c in chunks]
        self.hash.update(repr(told).encode())


def telling(digest: Digest, *, fast: bool) -> fleet.MakeEngine:
    """Makes engines that tell their batches; without ``fast`` plain ones, which take one step at a time."""

    class Plain(Scheduler):
        def _submitted(self, batch: Batch) -> Turn:
            digest.add(batch.chunks)
            return super()._submitted(batch)

    class Listed(LockstepScheduler):
        def everybody(self, part: Together) -> list[Chunk]:
            members = sorted([*self.group.members.values(), *part.leavers], key=lambda member: member.request.key)
            return [self.chunk(member, part.step) for member in members]

        def step_alone(self) -> Together | None:
            part = super().step_alone()
            if part is not None:
                digest.add(self.everybody(part))
            return part

        def _submitted(self, batch: Batch) -> Turn:
            chunks = list(batch.chunks)
            if isinstance(batch, GroupBatch) and (part := batch.together) is not None:
                chunks[part.at : part.at] = self.everybody(part)
            digest.add(chunks)
            return super()._submitted(batch)

    class Slow(Engine):
        def run_ahead(self, until: float | None = None) -> None:
            return None

    def make(config: SchedulerConfig, executor: VirtualExecutor, windows: Sequence[int | None]) -> Engine:
        if fast and isinstance(executor, LockstepExecutor):
            return FastEngine(config, executor, windows, scheduler=Listed)
        return Slow(config, executor, windows, scheduler=Plain)

    return make


def one_by_one(problem: Problem, candidate: Candidate, held: Ledger) -> dict[str, Any]:
    """The same configuration both ways; SystemExit where they differ."""
    runs = []
    for fast in (True, False):
        digest = Digest()
        stages = [problem.stage_costs(candidate) for _ in range(candidate.replicas)]
        executors = [executor_of(problem, candidate, costs, held.num_blocks) for costs in stages]
        config, make = problem.config(candidate), telling(digest, fast=fast)
        runs.append((fleet.serve(problem.prompts, config, problem.windows, executors, make), digest))
    (one, its), (two, other) = runs
    if (its.hash.digest(), its.batches) != (other.hash.digest(), other.batches):
        raise SystemExit(f"{candidate}: other batches without fast-forward")
    worst = 0.0
    for a, b in zip(one.requests, two.requests, strict=True):
        if replace(a, token_times=(), first_scheduled=0) != replace(b, token_times=(), first_scheduled=0):
            raise SystemExit(f"{candidate}: a request fared otherwise without fast-forward")
        for x, y in zip(
            (*a.token_times, a.first_scheduled or 0), (*b.token_times, b.first_scheduled or 0), strict=True
        ):
            worst = max(worst, abs(x - y) / max(abs(y), 1e-12))
    if worst > 1e-9:
        raise SystemExit(f"{candidate}: times differ by {worst:.1e} without fast-forward")
    return {"batches": its.batches, "worst_time_error": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--devices", default="h200")
    parser.add_argument("--profile", action="append", default=[])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--configurations", type=int, default=100)
    parser.add_argument("--time-scales", type=float, nargs="+", default=[1.0, 0.5, 0.2])
    parser.add_argument("--check", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    processes, results = usable_cpus(), []
    bar = BAR_SECONDS * args.requests / 1000 * args.configurations / 100
    print(
        f"{args.configurations} configurations × {args.requests} requests of {args.trace.name}, {processes} processes"
    )
    print(f"bar: {bar:.0f} s on two cores, {bar * 2 / args.configurations:.2f} s of one core for a configuration")
    for scale in args.time_scales:
        traffic = Traffic(trace=args.trace, num_requests=args.requests)
        asked = PlanAsked(
            args.model, traffic, Arrivals(time_scale=scale), "ttft_p99=2,tpot_p99=50ms", args.devices,
            profiles=tuple(args.profile),
        )  # fmt: skip
        problem = make_problem(asked)
        chosen = drawn(problem, args.configurations, args.seed)
        seconds, cpu_seconds, outcomes = measured(problem, chosen, processes)
        traffic_seconds = sum(args.requests / outcome.requests_per_second for outcome in outcomes)
        steps = [outcome.steps for outcome in outcomes]
        checked = [one_by_one(problem, *pair) for pair in chosen[: args.check]]
        result = {
            "time_scale": scale, "configurations": len(outcomes), "wall_seconds": seconds,
            "cpu_seconds_each": cpu_seconds / len(outcomes), "simulated_over_wall": traffic_seconds / seconds,
            "median_steps": statistics.median(steps), "peak_running": max(o.extent.peak_running for o in outcomes),
            "checked": len(checked), "worst_time_error": max((c["worst_time_error"] for c in checked), default=None),
        }  # fmt: skip
        results.append(result)
        print(
            f"gaps × {scale:g}: {seconds:.1f} s, {result['cpu_seconds_each']:.2f} CPU seconds each; "
            f"{traffic_seconds:,.0f} s of traffic, {result['simulated_over_wall']:,.0f} × the wall; median "
            f"{result['median_steps']:,.0f} steps, up to {result['peak_running']} at once"
            + (
                f"; {len(checked)} the same step by step, times within {result['worst_time_error']:.0e}"
                if checked
                else ""
            )
        )
    print(json.dumps({"bench": "plan_speed", "model": Path(args.model).name, "devices": args.devices,
                      "requests": args.requests, "processes": processes, "bar_seconds": bar,
                      "runs": results, "arguments": {k: str(v) for k, v in vars(args).items()}}))  # fmt: skip


if __name__ == "__main__":
    main()
