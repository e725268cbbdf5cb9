"""From a plan to the options that start its winner: what ``foretell serve --plan`` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.benchmark.tables import number
from foretell.errors import ConfigError
from foretell.plan.command import PlanAsked, default_path, make_plan
from foretell.plan.plan import load, save

AUTO = "auto"
# What ``auto`` plans for where no plan was made yet: a conversation or two a second, read as it is written
USUAL_SLO = "ttft_p99=2,tpot_p99=0.15"
USUAL_RATE, USUAL_PROMPTS, USUAL_ANSWERS = 1.0, "64-512", "32-256"


@dataclass(frozen=True, slots=True)
class Start:
    """``options`` of the engine, without the model; ``words``: what was planned, in one line."""

    model: str
    options: dict[str, Any]
    replicas: int
    words: str


def start_of(
    plan: str, model: str | None, chosen: Mapping[str, Any], usual: Mapping[str, Any], replicas: int = 1
) -> Start:
    """``plan``: a file, or "auto" for the last plan of this model, made now if there is none. ``chosen`` are the
    engine options asked for, ``usual`` those that nobody asked for. ConfigError where both the plan and the user say
    something, and not the same."""
    data = _auto(model) if plan == AUTO else load(Path(plan))
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
    return Start(data["model"], {**chosen, **engine}, data["replicas"], _words(data))


def _auto(model: str | None) -> dict[str, Any]:
    from foretell.benchmark.traffic import Arrivals, Traffic
    from foretell.store.aliases import DEFAULT_MODEL

    model = model or DEFAULT_MODEL
    path = default_path(model)
    if not path.is_file():
        traffic = Traffic(prompt_lengths=USUAL_PROMPTS, output_lengths=USUAL_ANSWERS)
        made = make_plan(PlanAsked(model, traffic, Arrivals(rate=USUAL_RATE), USUAL_SLO))
        if made.winner is None:
            raise ConfigError(f"no configuration of {model} can be run here: foretell plan --explain says why")
        save(made.as_dict(), path)
    return load(path)


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
    return f"plan for {data['workload']}: {'; '.join(parts)}"
