"""One configuration, simulated: what its requests would see, and what the time would go into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from foretell.config import SchedulerConfig
from foretell.cost.ranks import StageCost
from foretell.executor.lockstep import LockstepExecutor
from foretell.executor.staged import StagedExecutor
from foretell.executor.virtual import VirtualExecutor
from foretell.parallel.layout import in_flight
from foretell.plan.fleet import Extent, FleetRun, serve
from foretell.plan.goals import Goal, measured
from foretell.plan.problem import Problem
from foretell.plan.space import Candidate
from foretell.trace.metrics import RequestTimes, span_seconds

TERMS = ("weights", "compute", "KV reads", "collectives", "CPU", "queue")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated configuration gave. ``latencies`` in seconds, in the order of the goal's measures; ``terms``:
    the share of a request's time that each bound takes; rates per second."""

    goodput: float
    good_share: float
    latencies: tuple[float, ...]
    requests_per_second: float
    output_tokens_per_second: float
    terms: dict[str, float]
    extent: Extent
    preemptions: int
    steps: int
    beyond_share: float  # of the steps, outside what was measured

    @property
    def bound(self) -> str:
        """What takes most of a request's time."""
        return max(TERMS, key=lambda term: self.terms[term])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        return cls(**{**data, "latencies": tuple(data["latencies"]), "extent": Extent(**data["extent"])})


def evaluate(problem: Problem, candidate: Candidate, num_blocks: tuple[int, ...], *, factor: float = 1.0) -> Outcome:
    """BeyondProfileError where a step lies too far outside what was measured."""
    config = problem.config(candidate)
    if config.enable_prefix_caching and not problem.shares_beginnings:
        # nothing can be found in the cache but what a preempted request left there: try without, which is faster
        plain = _simulate(problem, candidate, replace(config, enable_prefix_caching=False), num_blocks, factor)
        if not plain.extent.preempted:
            return plain
    return _simulate(problem, candidate, config, num_blocks, factor)


def _simulate(
    problem: Problem, candidate: Candidate, config: SchedulerConfig, num_blocks: tuple[int, ...], factor: float
) -> Outcome:
    fleets = [problem.stage_costs(candidate, factor=factor) for _ in range(candidate.replicas)]
    executors = [executor_of(problem, candidate, stages, num_blocks) for stages in fleets]
    return _outcome(serve(problem.prompts, config, problem.windows, executors), fleets, problem.goal)


def executor_of(
    problem: Problem, candidate: Candidate, stages: Sequence[StageCost], num_blocks: tuple[int, ...]
) -> VirtualExecutor:
    """With the batches in flight that the engine would have."""
    depth, chain = in_flight(candidate.pp, "cpu" if problem.machine.is_cpu else "cuda")
    if candidate.pp > 1:
        return StagedExecutor(stages, num_blocks, depth=depth)
    lockstep = all(window is None for window in problem.windows)
    make = LockstepExecutor if lockstep else VirtualExecutor
    return make(stages[0], num_blocks, depth=depth, chain=chain)


def _outcome(run: FleetRun, fleets: Sequence[Sequence[StageCost]], goal: Goal) -> Outcome:
    requests = run.requests
    seconds = span_seconds(requests) or 1e-9
    good = sum(map(goal.objectives.met_by, requests))
    steps = sum(cost.step.steps for stages in fleets for cost in stages)
    return Outcome(
        goodput=good / seconds,
        good_share=good / len(requests),
        latencies=measured(requests, goal),
        requests_per_second=len(requests) / seconds,
        output_tokens_per_second=sum(request.num_tokens for request in requests) / seconds,
        terms=time_terms(requests, fleets),
        extent=run.extent,
        preemptions=sum(request.preemptions for request in requests),
        steps=run.steps,
        beyond_share=sum(cost.step.beyond for stages in fleets for cost in stages) / max(1, steps),
    )


def time_terms(requests: Sequence[RequestTimes], fleets: Sequence[Sequence[StageCost]]) -> dict[str, float]:
    """Shares of the requests' time, summing to 1: waiting in the queue, and what the steps of the busiest stages went
    into."""
    whole = sum(request.e2e_seconds for request in requests) or 1e-9
    queued = sum(request.queue_seconds or 0.0 for request in requests)
    queue = min(1.0, max(0.0, queued / whole))
    spent = dict.fromkeys(TERMS, 0.0)
    for stages in fleets:
        busiest = max(stages, key=lambda cost: cost.busy_seconds)
        for name, seconds in step_terms(busiest).items():
            spent[name] += seconds
    busy = sum(spent.values()) or 1e-9
    return {**{name: (1 - queue) * seconds / busy for name, seconds in spent.items()}, "queue": queue}


def step_terms(cost: StageCost) -> dict[str, float]:
    """Seconds of a stage's steps by what they went into. ``weights``: what a step of one token takes of the linear
    layers and the head, which is reading them once; ``compute``: what more tokens add, and the attention of prompts;
    ``KV reads``: the attention of decode steps; ``CPU``: the host's part where it shows, and launches."""
    spent = dict.fromkeys(TERMS[:-1], 0.0)
    one = cost.step.without_histories(1, 1, 1, decodes=True)
    floor = one.linear + one.head
    for kind, count in cost.seen.items():
        tokens, sampled, sequences, decodes = kind
        parts = cost.step.without_histories(tokens, sampled, sequences, decodes=decodes)
        talk = cost.talk_seconds(tokens, sampled)
        plain = parts.linear + parts.head
        host = max(0.0, parts.host - plain) if parts.hidden else parts.host
        launches = max(0.0, parts.least - plain)
        left = max(0.0, cost.seconds_of[kind] / cost.factor - count * (plain + host + launches + talk))
        weights = min(floor, plain)
        spent["weights"] += count * weights
        spent["compute"] += count * (plain - weights)
        spent["collectives"] += count * talk
        spent["CPU"] += count * (host + launches)
        spent["KV reads" if decodes else "compute"] += left
    return spent
