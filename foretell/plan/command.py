"""``foretell plan`` from checked options to the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from foretell.benchmark.commands import Asked, with_rate
from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.config import ModelSpec
from foretell.cost.floor import WeightBytes
from foretell.cost.grid import FARTHEST
from foretell.cost.hardware import BYTES_PER_ELEMENT
from foretell.cost.named import ANALYTIC, open_profile
from foretell.cost.profile import Profile
from foretell.cpus import usable_cpus
from foretell.errors import ConfigError
from foretell.model.parameters import count_parameters
from foretell.plan.fleet import Prompts
from foretell.plan.goals import Goal
from foretell.plan.machine import Machine, parse_devices
from foretell.plan.plan import Plan, conclude
from foretell.plan.problem import Problem
from foretell.plan.search import search
from foretell.plan.space import candidates, usual_choices
from foretell.store import ModelFiles
from foretell.trace.workloads import Workload

MOST_REQUESTS = 1000  # of a trace, unless told otherwise
USUAL_REQUESTS = 200
USUAL_CHUNK = 512  # tokens


@dataclass(frozen=True, slots=True)
class PlanAsked:
    """What the command is told. ``profiles``: files or names, one for each way to keep the weights; none: the
    device's own."""

    model: str
    traffic: Traffic
    arrivals: Arrivals
    slo: str | None = None
    devices: str = "cpu"
    objective: str = "goodput"
    profiles: tuple[str, ...] = ()
    max_model_len: int | None = None
    most: int | None = None
    offline: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """As a plan's file keeps it."""
        data = asdict(self)
        data["traffic"]["trace"] = None if self.traffic.trace is None else str(self.traffic.trace)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanAsked:
        traffic = {**data["traffic"]}
        if traffic["trace"] is not None:
            traffic["trace"] = Path(traffic["trace"])
        told = {"traffic": Traffic(**traffic), "arrivals": Arrivals(**data["arrivals"])}
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**{**known, **told, "profiles": tuple(data["profiles"])})


Bar = Callable[[], AbstractContextManager[Callable[[int, int, str], None]]]


def silent_bar() -> AbstractContextManager[Callable[[int, int, str], None]]:
    """Nobody wants to know."""
    return nullcontext(lambda done, total, what: None)


def make_plan(asked: PlanAsked, *, bar: Bar = silent_bar) -> Plan:
    """``bar()``: a context that yields what hears of the progress."""
    problem = make_problem(asked)
    space = candidates(usual_choices(problem.machine, tuple(problem.profiles)))
    with bar() as report:
        found = search(problem, space, processes=usable_cpus(), most=asked.most, report=report)
    plan = conclude(problem, found, model=asked.model)
    plan.asked = asked.as_dict()
    if plan.winner is not None:
        plan.engine["dtype"] = engine_dtype(found.candidates[plan.winner].weights)
    return plan


def make_problem(asked: PlanAsked) -> Problem:
    """What there is to decide on. ConfigError for what cannot be planned."""
    from foretell.model.load import spec_for
    from foretell.store import resolve

    goal, machine = Goal.parse(asked.slo, asked.objective), parse_devices(asked.devices)
    asked.traffic.check()
    files = resolve(asked.model, offline=asked.offline)
    spec = spec_for(files)
    workload = build_workload(asked, spec.vocab_size)
    longest = max(request.prompt_len + request.output_len for request in workload.requests)
    profiles = open_profiles(asked, machine, spec, files.name, longest)
    prompts = Prompts(workload, spec.vocab_size)
    prompts.hashes(16)
    problem = Problem(
        spec,
        machine,
        goal,
        prompts,
        profiles,
        {label: kept_bytes(files, spec, profile) for label, profile in profiles.items()},
        max_model_len=asked.max_model_len,
    )
    _check_lengths(problem)
    return problem


def open_profiles(
    asked: PlanAsked, machine: Machine, spec: ModelSpec, name: str, longest: int = 1
) -> dict[str, Profile]:
    """By how the weights are kept. A device's own measurements give way to its data sheet where they do not reach to
    requests of ``longest`` tokens. ConfigError where two are of the same kind, or differ in the cache's dtype."""
    wanted: Sequence[str | None] = asked.profiles or (None if machine.key == "cpu" else machine.key,)
    found: dict[str, Profile] = {}
    for one in wanted:
        profile = open_profile(one, spec, model=name)
        if not asked.profiles and one is not None and _excess(profile, longest) > FARTHEST:
            profile = open_profile(ANALYTIC + one, spec, model=name)
        if profile.weight_format in found:
            raise ConfigError(f"two profiles are of {profile.weight_format} weights: give one for each format")
        found[profile.weight_format] = profile
    if len({profile.dtype for profile in found.values()}) > 1:
        raise ConfigError("the profiles differ in the KV cache's dtype: plan for one dtype at a time")
    return found


def _excess(profile: Profile, longest: int) -> float:
    """Doublings by which a request of so many tokens leaves what was measured, decoded or prefilled in chunks."""
    return max(profile.decode_rate.excess(1, longest), profile.prefill_rate.excess(USUAL_CHUNK, longest))


def build_workload(asked: PlanAsked, vocab_size: int) -> Workload:
    """The traffic at its times: of a trace the first thousand requests, unless told otherwise."""
    told, arrivals = with_rate(Asked(asked.model, {}, asked.traffic, 1, None), asked.arrivals)
    traffic = told.traffic
    if traffic.trace is not None and traffic.num_requests is None:
        traffic = replace(traffic, num_requests=MOST_REQUESTS)
    built = traffic.build(vocab_size, None, default_requests=USUAL_REQUESTS)
    return arrivals.apply(built, traffic.seed)


def kept_bytes(files: ModelFiles, spec: ModelSpec, profile: Profile) -> int:
    """All weights of one copy, by the measured profile of this very model if there is one."""
    same = profile.weight_bytes and profile.spec == spec and profile.source == "measured"
    return profile.weight_bytes if same else weight_bytes(files, spec, profile.weight_format)


def weight_bytes(files: ModelFiles, spec: ModelSpec, weight_format: str) -> int:
    """All weights of one copy, as they are kept: by their number, or by the files where they stay as shipped."""
    if weight_format in BYTES_PER_ELEMENT:
        return count_parameters(spec).total * BYTES_PER_ELEMENT[weight_format]
    if files.size_bytes:
        return files.size_bytes
    kept = WeightBytes.in_dtype(spec, "bfloat16")
    return int(kept.layers + kept.head)


def engine_dtype(weight_format: str) -> str:
    """The engine's option that keeps weights so."""
    return weight_format if weight_format in BYTES_PER_ELEMENT else "auto"


def _check_lengths(problem: Problem) -> None:
    most = problem.max_model_len or problem.spec.max_position_embeddings
    if problem.longest > most:
        raise ConfigError(
            f"the traffic has a request of {problem.longest} tokens and the model serves up to {most}: "
            "cap the lengths with --max-input-len and --max-output-len"
        )


def default_path(model: str) -> Path:
    """Where the last plan for a model is kept: what ``serve --plan auto`` takes."""
    from foretell.store.cache import cache_home

    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in model)
    return cache_home() / "plans" / f"{name}.json"
