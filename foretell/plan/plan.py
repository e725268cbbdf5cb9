"""A finished plan: what was found, who won, what is predicted of it, and how the engine is started with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foretell.cost.grid import BeyondProfileError
from foretell.errors import ConfigError
from foretell.plan.evaluate import Outcome, evaluate
from foretell.plan.goals import Goal, measure_name
from foretell.plan.problem import Problem
from foretell.plan.rank import best_with, pareto, ranking, settle_on_the_plain
from foretell.plan.search import Found
from foretell.plan.space import Candidate

VERSION = 1
ENGINE_FIELDS = (
    "dtype", "tp", "pp", "policy", "max_num_seqs", "max_num_batched_tokens", "max_chunk_tokens",
    "enable_prefix_caching", "kv_cache_bytes", "memory_share", "device", "max_model_len",
)  # fmt: skip  # of EngineOptions: what a plan may set


@dataclass(slots=True)
class Plan:
    """``order``: indices of what was simulated, the best first. ``low`` and ``high``: the winner again, every step at
    the lower and the upper end of the profile's interval."""

    model: str
    workload: str
    devices: str
    goal: Goal
    found: Found
    order: list[int]
    pareto: list[int]
    engine: dict[str, Any] = field(default_factory=dict)
    replicas: int = 1
    low: Outcome | None = None
    high: Outcome | None = None
    profile: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # what the command was told

    @property
    def winner(self) -> int | None:
        return self.order[0] if self.order else None

    def alternatives(
        self, choices: Sequence[tuple[str, Callable[[Candidate], Any]]]
    ) -> Iterator[tuple[str, Any, int]]:
        """(choice, value, index) of the best configuration with each value that the winner does not have; the
        winner's own index where it would be the same run."""
        if self.winner is None:
            return
        own = self.found.candidates[self.winner]
        for name, key in choices:
            for value, index in best_with(self.found, self.order, key).items():
                if value != key(own):
                    yield name, value, index

    def predicted(self) -> Iterator[tuple[str, float, float, float]]:
        """(name, value, low, high) of the winner's figures; those in seconds end in " s"."""
        if self.winner is None:
            return
        own = self.found.outcomes[self.winner]
        every = [own, *(end for end in (self.low, self.high) if end is not None)]
        for at, measure in enumerate(self.goal.measures):
            values = [outcome.latencies[at] for outcome in every]
            yield f"{measure_name(*measure)} s", values[0], min(values), max(values)
        for name in ("goodput", "good_share", "requests_per_second", "output_tokens_per_second"):
            values = [getattr(outcome, name) for outcome in every]
            yield name.replace("_per_second", "/s").replace("_", " "), values[0], min(values), max(values)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = self.found
        return {
            "plan": VERSION,
            "model": self.model,
            "workload": self.workload,
            "devices": self.devices,
            "objective": self.goal.objective,
            "limits": {limit.name: limit.seconds for limit in self.goal.limits},
            "profile": self.profile,
            "asked": self.asked,
            "winner": None if self.winner is None else self._described(self.winner),
            "predicted": {name: {"value": v, "low": low, "high": high} for name, v, low, high in self.predicted()},
            "memory": None if self.winner is None else asdict(found.ledgers[self.winner]),
            "engine": self.engine,
            "replicas": self.replicas,
            "pareto": [self._described(index) for index in self.pareto],
            "simulated": [self._described(index) for index in self.order],
            "pruned": [
                {**found.candidates[p.index].as_dict(), "kind": p.kind, "reason": p.reason}
                for p in found.pruned.values()
            ],
        }

    def _described(self, index: int) -> dict[str, Any]:
        outcome = self.found.outcomes[index]
        named = {measure_name(*m): v for m, v in zip(self.goal.measures, outcome.latencies, strict=True)}
        return {
            **self.found.candidates[index].as_dict(),
            **asdict(outcome),
            "latencies": named,
            "bound": outcome.bound,
        }


def conclude(problem: Problem, found: Found, *, model: str, dtype: str = "auto") -> Plan:
    """Rank what was found, and simulate the winner at both ends of its interval."""
    goal = problem.goal
    for first in ranking(goal, found)[:1]:
        settle_on_the_plain(found, first)
    workload = problem.prompts.workload
    plan = Plan(
        model, f"{workload.name}: {workload.description}", str(problem.machine), goal, found, ranking(goal, found),
        pareto(found),
    )  # fmt: skip
    if plan.winner is None:
        return plan
    chosen, held = found.candidates[plan.winner], found.ledgers[plan.winner]
    profile = problem.profiles[chosen.weights]
    plan.profile = {"model": profile.model, "hardware": profile.hardware, "source": profile.source,
                    "created": profile.created, "low": profile.low, "high": profile.high}  # fmt: skip
    plan.engine, plan.replicas = engine_options(problem, chosen, held.kv_cache_bytes, dtype), chosen.replicas
    plan.low, plan.high = (_at(problem, chosen, held.num_blocks, f) for f in (profile.low, profile.high))
    return plan


def _at(problem: Problem, candidate: Candidate, num_blocks: tuple[int, ...], factor: float) -> Outcome | None:
    try:
        return evaluate(problem, candidate, num_blocks, factor=factor)
    except BeyondProfileError:
        return None


def engine_options(problem: Problem, candidate: Candidate, kv_cache_bytes: int, dtype: str) -> dict[str, Any]:
    """Of EngineOptions, what starts this configuration."""
    cpu = problem.machine.is_cpu
    return {
        "dtype": dtype,
        "tp": candidate.tp,
        "pp": candidate.pp,
        "policy": candidate.policy,
        "max_num_seqs": candidate.max_num_seqs,
        "max_num_batched_tokens": candidate.max_num_batched_tokens,
        "max_chunk_tokens": candidate.max_chunk_tokens,
        "enable_prefix_caching": candidate.enable_prefix_caching,
        "kv_cache_bytes": kv_cache_bytes if cpu else None,
        "memory_share": 0.9 if cpu else candidate.kv_share,
        "device": "cpu" if cpu else "cuda",
        "max_model_len": problem.max_model_len,
    }


def save(data: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the plan {path} cannot be written: {error.strerror}") from None


def load(path: Path) -> dict[str, Any]:
    """What ``save`` wrote; ConfigError, in one line, if it is no plan that an engine can be started with."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the plan {path} cannot be read: {error.strerror}: make one with foretell plan") from None
    except ValueError:
        raise ConfigError(f"the plan {path} is no JSON: make it again with foretell plan") from None
    if not isinstance(data, dict) or data.get("plan") != VERSION:
        raise ConfigError(f"the plan {path} is no plan of this version: make it again with foretell plan")
    engine = data.get("engine")
    if not isinstance(engine, dict) or not engine or not isinstance(data.get("model"), str):
        raise ConfigError(f"the plan {path} has no winner: nothing can be started with it")
    unknown = set(engine) - set(ENGINE_FIELDS)
    if unknown:
        raise ConfigError(f"the plan {path} sets {', '.join(sorted(unknown))}, which no plan may")
    return data
