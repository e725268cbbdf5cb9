"""From a plan to the options that start its winner: what ``foretell serve --plan`` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foretell.benchmark.tables import number
from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.errors import ConfigError
from foretell.plan.command import Bar, PlanAsked, default_path, make_plan, make_problem, silent_bar
from foretell.plan.plan import load, save
from foretell.store.aliases import DEFAULT_MODEL

AUTO = "auto"
# What ``auto`` plans for where no plan was made yet: conversations, read as they are written
USUAL_SLO = "ttft_p99=2,tpot_p99=0.15"
USUAL_PROMPTS, USUAL_ANSWERS, USUAL_REQUESTS = "64-512", "32-256", 100
USUAL_LOAD = 0.6
MOST = 64  # configurations simulated: a server is waited for


@dataclass(frozen=True, slots=True)
class Start:
    """``options`` of the engine, without the model; ``words``: what was planned, in one line; ``path``: where."""

    model: str
    options: dict[str, Any]
    replicas: int
    words: str
    path: Path


def start_of(
    plan: str,
    model: str | None,
    chosen: Mapping[str, Any],
    usual: Mapping[str, Any],
    replicas: int = 1,
    *,
    bar: Bar = silent_bar,
) -> Start:
    """``plan``: a file, or "auto" for the last plan of this model, made now if there is none. ``chosen`` are the
    engine options asked for, ``usual`` those that nobody asked for. ConfigError where both the plan and the user say
    something, and not the same. ``bar()``: a context that yields what hears of the planning, if there is any."""
    path = _auto(model or DEFAULT_MODEL, chosen, bar) if plan == AUTO else Path(plan)
    data = load(path)
    if model is not None and model != data["model"]:
        raise ConfigError(f"the plan is for {data['model']}: leave {model} out, or plan for it")
    engine = {name: value for name, value in data["engine"].items() if value is not None}
    clashes = [
        name for name, value in engine.items() if name in chosen and chosen[name] not in (usual.get(name), value)
    ]
    if replicas not in (1, data["replicas"]):
        clashes.append("replicas")
    if clashes:
        options = ", ".join("--" + name.replace("_", "-") for name in clashes)
        raise ConfigError(f"the plan decides on {options}: leave that out, or plan again")
    return Start(data["model"], {**chosen, **engine}, data["replicas"], _words(data), path)


def _auto(model: str, chosen: Mapping[str, Any], bar: Bar) -> Path:
    """The last plan for the model, or a new one for the usual traffic: on the GPU where the engine would take one."""
    from foretell.store import resolve

    path = default_path(model)
    if not path.is_file():
        devices = _devices(str(chosen.get("device", "auto")))
        asked = PlanAsked(
            model,
            Traffic(prompt_lengths=USUAL_PROMPTS, output_lengths=USUAL_ANSWERS, num_requests=USUAL_REQUESTS),
            Arrivals(),
            USUAL_SLO,
            devices,
            profiles=_substitutes(resolve(model, offline=chosen.get("offline")).name) if devices == "cpu" else (),
            most=MOST,
            offline=chosen.get("offline"),
        )
        made = make_plan(replace(asked, arrivals=Arrivals(rate=_usual_rate(asked))), bar=bar)
        if made.winner is None:
            raise ConfigError(f"no configuration of {model} can be run here: foretell plan --explain says why")
        save({**made.as_dict(), "substitute": bool(asked.profiles)}, path)
    return path


def _devices(device: str) -> str:
    """What to plan for: this machine's processor, or its GPU."""
    from foretell.cost.machine import device_key
    from foretell.options import EngineOptions, resolve_device

    if device == "cpu" or resolve_device(EngineOptions(model="planned", device=device)) == "cpu":
        return "cpu"
    key = device_key("cuda")
    if not key:
        raise ConfigError("nothing is known of this GPU: plan with --profile, after foretell calibrate")
    return key


def _usual_rate(asked: PlanAsked) -> float:
    """Requests per second that keep an engine of usual options busy for ``USUAL_LOAD`` of its time."""
    from foretell.cost.rates import rates_foretold
    from foretell.options import EngineOptions, scheduler_config

    problem = make_problem(replace(asked, arrivals=Arrivals(rate=1.0)))
    cpu, spec = problem.machine.is_cpu, problem.spec
    config = scheduler_config(EngineOptions(asked.model), spec.max_position_embeddings, "cpu" if cpu else "cuda")
    rates = rates_foretold(next(iter(problem.profiles.values())), config)
    if not rates:
        raise ConfigError(f"the profile of {asked.model} does not reach to usual requests: foretell calibrate again")
    requests = problem.prompts.workload.requests
    prompts = sum(request.prompt_len for request in requests) / len(requests)
    answers = sum(request.output_len for request in requests) / len(requests)
    seconds = prompts / rates["prompt_tokens_per_second"] + answers * rates["tpot_full_seconds"] / config.max_num_seqs
    return float(f"{USUAL_LOAD / seconds:.2g}")


def _substitutes(model: str) -> tuple[str, ...]:
    """What to plan with where this machine was never calibrated for the model, or by another version."""
    from foretell.cost.named import own_path
    from foretell.cost.profile import Profile

    try:
        Profile.load(own_path(model))
    except ConfigError:
        return ("cpu",)
    return ()


def _words(data: Mapping[str, Any]) -> str:
    """The layout and what is predicted, as the log should have it."""
    engine = data["engine"]
    parts = [
        f"tp={engine['tp']} pp={engine['pp']} replicas={data['replicas']}, {engine['policy']}, "
        f"{engine['max_num_seqs']} sequences, {engine['max_num_batched_tokens']} tokens a step"
    ]
    for name, value in data.get("predicted", {}).items():
        if name.endswith(" s"):
            parts.append(f"{name.removesuffix(' s')} {number(1e3 * value['value'])} ms")
    words = f"plan for {data['workload']}: {'; '.join(parts)}"
    if data.get("substitute"):
        words += f" (by the figures of another machine: foretell calibrate {data['model']}, then foretell plan)"
    return words
