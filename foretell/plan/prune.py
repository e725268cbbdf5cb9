"""What need not be simulated, and why: impossible, too large, the same run as another, or worse in every way.

Nothing here may remove a plan that could win, nor one of the Pareto set: bounds are optimistic, and "the same run" is
proved from how far a simulated run went towards each limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from foretell.config import SchedulerConfig
from foretell.cost.grid import Curve
from foretell.cost.ranks import StageCost
from foretell.parallel.layout import refusal
from foretell.plan.evaluate import Outcome
from foretell.plan.goals import latency
from foretell.plan.problem import Problem
from foretell.plan.space import Candidate
from foretell.trace.metrics import RequestTimes, percentile


def illegal(problem: Problem, candidate: Candidate) -> str:
    """Why the engine cannot run it at all; "" if it can."""
    machine = problem.machine
    if reason := refusal(problem.spec, candidate.tp, candidate.pp):
        return reason
    if not machine.is_cpu and candidate.ranks > machine.count:
        return f"{candidate.ranks} ranks need more than {machine.count} devices"
    if candidate.max_num_seqs > candidate.max_num_batched_tokens:
        return f"{candidate.max_num_seqs} sequences do not fit in a step of {candidate.max_num_batched_tokens} tokens"
    return ""


# -- the same run ---------------------------------------------------------------------------------------------


def same_run(
    problem: Problem,
    one: Candidate,
    blocks: tuple[int, ...],
    done: Candidate,
    held: tuple[int, ...],
    outcome: Outcome,
) -> str:
    """Why ``one`` (with ``blocks``) must give the same run as ``done`` (with ``held``), which gave ``outcome``; "" if
    it may not."""
    if (one.weights, one.layout, one.policy) != (done.weights, done.layout, done.policy):
        return ""
    if one.enable_prefix_caching != done.enable_prefix_caching and not _cache_idle(problem, outcome):
        return ""
    extent, reasons = outcome.extent, []
    if one.max_num_seqs != done.max_num_seqs:
        if one.pp > 1 or extent.peak_running >= min(one.max_num_seqs, done.max_num_seqs):
            return ""
        reasons.append(f"never more than {extent.peak_running} requests ran at once")
    if one.max_num_batched_tokens != done.max_num_batched_tokens:
        if extent.most_tokens >= min(one.max_num_batched_tokens, done.max_num_batched_tokens):
            return ""
        reasons.append(f"never more than {extent.most_tokens} tokens were in a step")
    caps = [c.max_chunk_tokens or c.max_num_batched_tokens for c in (one, done)]
    if caps[0] != caps[1] and extent.longest_chunk >= min(caps):
        return ""
    if one.max_chunk_tokens != done.max_chunk_tokens:
        reasons.append(f"no prompt had a chunk of more than {extent.longest_chunk} tokens")
    if blocks != held:
        fewer = any(a < b for a, b in zip(blocks, held, strict=True))
        if _blocks_matter(problem, done, outcome) or (fewer and not _blocks_suffice(problem, one, blocks, outcome)):
            return ""
        reasons.append("KV blocks never ran short")
    if one.enable_prefix_caching != done.enable_prefix_caching:
        reasons.append("no two prompts begin alike")
    return " and ".join(reasons)


def _cache_idle(problem: Problem, outcome: Outcome) -> bool:
    """Whether a prefix cache changes nothing: nothing is shared, and nothing comes back after a preemption."""
    return not outcome.extent.preempted and not problem.shares_beginnings


def _blocks_matter(problem: Problem, done: Candidate, outcome: Outcome) -> bool:
    """Whether more KV blocks might change the run."""
    extent = outcome.extent
    lost = extent.evicted and done.enable_prefix_caching and problem.shares_beginnings
    windowed = any(window is not None for window in problem.windows)  # chunks are cut to the blocks that are free
    return extent.refused or extent.preempted or lost or windowed


def _blocks_suffice(problem: Problem, one: Candidate, blocks: tuple[int, ...], outcome: Outcome) -> bool:
    """Whether so few never run short either: all that ever ran at once fit at the longest request's length."""
    if one.enable_prefix_caching and problem.shares_beginnings:
        return False  # fewer blocks forget sooner
    config = problem.config(one)
    most = outcome.extent.peak_running * ceil(problem.longest / config.block_size)
    return all(number - int(config.watermark * number) >= most for number in blocks)


# -- worse in every way -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bounds:
    """The best that a configuration could give: goodput at most, latencies at least (seconds, as the goal's
    measures)."""

    goodput: float
    latencies: tuple[float, ...]


def bounds(problem: Problem, candidate: Candidate) -> Bounds:
    """From the least that each step can take, whatever the scheduler does with it.

    A prompt's tokens go through every stage in chunks: each step takes at least what they take at the best rate per
    token that the budget allows. No token of an answer comes sooner than a step of one token takes on every stage.
    Attention is left out: it could only add.
    """
    floors = [_Floor(cost, problem.config(candidate)) for cost in problem.stage_costs(candidate)]
    shared = candidate.enable_prefix_caching and problem.shares_beginnings
    alone = [
        _alone(floors, 1 if shared else request.prompt_len, request.output_len)
        for request in problem.prompts.workload.requests
    ]
    arrivals = [request.arrival_seconds for request in problem.prompts.workload.requests]
    times = [
        RequestTimes(at, 0, (at + first, at + first + rest), counted_tokens=request.output_len)
        for at, (first, rest), request in zip(arrivals, alone, problem.prompts.workload.requests, strict=True)
    ]
    good = sum(map(problem.goal.objectives.met_by, times))
    last = max(time.token_times[-1] for time in times)
    seconds = max(last - min(arrivals), _work_seconds(problem, candidate, floors, shared), 1e-9)
    latencies = []
    for metric, percent in problem.goal.measures:
        values = sorted(v for v in (latency(time, metric) for time in times) if v is not None)
        latencies.append(percentile(values, percent) if values else 0.0)
    return Bounds(good / seconds, tuple(latencies))


class _Floor:
    """The least that steps on one stage take; right also where measured curves are not monotone."""

    def __init__(self, cost: StageCost, config: SchedulerConfig) -> None:
        profile = cost.step.profile
        curves = [profile.linear, *([profile.decode_linear] if profile.decode_linear is not None else [])]
        self.curves, budget = curves, config.max_num_batched_tokens
        self.talk = cost.talk_seconds(1, 0)
        self.one = self.step(1)
        points = {1.0, float(budget), *(x for curve in curves for x in curve.x if 1 <= x <= budget)}
        self.per_token = min(self.step(point) / point for point in points)

    def step(self, tokens: float) -> float:
        """At least, of a step of so many tokens or more."""
        return min(_least_from(curve, tokens) for curve in self.curves) + self.talk


def _least_from(curve: Curve, x: float) -> float:
    """The least value at x or beyond; the last slope goes on, up as a rule and never below 0."""
    falls = len(curve.x) > 1 and curve.y[-1] < curve.y[-2]
    return 0.0 if falls else min([curve(x), *(y for at, y in zip(curve.x, curve.y, strict=True) if at >= x)])


def _alone(floors: Sequence[_Floor], computed: int, output_len: int) -> tuple[float, float]:
    """(seconds to the first token, from there to the last) of a request that has the engine to itself, at least."""
    first = sum(max(f.one, computed * f.per_token) for f in floors)
    return first, max(0, output_len - 1) * sum(f.one for f in floors)


def _work_seconds(problem: Problem, candidate: Candidate, floors: Sequence[_Floor], shared: bool) -> float:
    """All the work of the fullest stage, spread evenly over the replicas, at the best rates."""
    requests = problem.prompts.workload.requests
    answered = sum(max(0, request.output_len - 1) for request in requests)
    tokens = answered + (0 if shared else sum(request.prompt_len for request in requests))
    steps = ceil(answered / candidate.max_num_seqs)
    return max(max(tokens * f.per_token, steps * f.one) for f in floors) / candidate.replicas


def dominated(bounds_: Bounds, devices: int, outcome: Outcome, other_devices: int) -> bool:
    """Whether even the best of one is no better in anything than what another gave, and worse in something."""
    pairs = [(-outcome.goodput, -bounds_.goodput), (float(other_devices), float(devices))]
    pairs += list(zip(outcome.latencies, bounds_.latencies, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
