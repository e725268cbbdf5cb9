"""A profile: what the engine's own operators take on one machine, for one model. Plain data in a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from foretell.config import KVGroup, ModelSpec, RopeSpec
from foretell.cost.grid import Curve, Surface
from foretell.errors import ConfigError

VERSION = 2
Origin = Literal["measured", "scaled", "analytic"]
Kind = Literal["decode", "prefill"]  # of a step: one token for each sequence, or any other
ADDED = {"reference_seconds", "weight_bytes", "process_bytes"}  # fields that profiles of this version may lack
CURVES, SURFACES = ("linear", "head", "host"), ("decode_rate", "prefill_rate")


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of a step = linear(tokens) + head(sampled rows) + attention + host(sequences).

    ``linear``: everything that sees each token alone. ``decode_rate`` and ``prefill_rate``: seconds of attention per
    query-key pair, mean over the layers, by (sequences, keys of each) and (query tokens, keys before them).
    ``low`` and ``high``: between these multiples of the prediction lay 90 % of the held-out steps; ``intervals`` has
    them by kind of step where there were enough of each.

    A device that runs ahead of the CPU differs in three ways. ``overlaps``: the host's work hides behind the
    device's, a step takes the longer of both. ``decode_linear`` is ``linear`` of decode steps, which a graph holds
    for each of ``graph_sizes``: a step costs what the next larger size does. ``eager_seconds`` is the least that a
    step without a graph takes, however small: the launching of its kernels.
    """

    model: str
    spec: ModelSpec
    dtype: str
    weight_format: str
    kernels: str
    hardware: str
    created: str  # ISO date and time
    versions: dict[str, str]
    block_size: int
    linear: Curve
    head: Curve
    host: Curve
    decode_rate: Surface
    prefill_rate: Surface
    low: float
    high: float
    median_error: float  # of the held-out steps, relative
    held_out: list[dict[str, Any]]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    source: Origin = "measured"
    device: str = ""  # its key among cost.devices.DEVICES
    note: str = ""  # of a scaled profile: what it was scaled from
    overlaps: bool = False
    decode_linear: Curve | None = None
    graph_sizes: tuple[int, ...] = ()
    eager_seconds: float = 0.0
    num_threads: int = 0  # of a CPU; 0 where that says nothing
    reference_seconds: float = 0.0  # of the step cost.stepping.REFERENCE, which tells how fast a machine is; 0: none
    weight_bytes: int = 0  # all weights as this engine really keeps them; 0: not known
    process_bytes: int = 0  # the engine's process beside weights, cache and activations; 0: not known

    def interval(self, kind: Kind) -> tuple[float, float]:
        return self.intervals.get(kind, (self.low, self.high))

    def save(self, path: Path) -> None:
        data: dict[str, Any] = {"version": VERSION}
        for one in fields(self):
            value = getattr(self, one.name)
            data[one.name] = value.as_dict() if isinstance(value, (Curve, Surface)) else value
        data["spec"] = asdict(self.spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """ConfigError, in one line, if it cannot be read or is of another version."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"the profile {path} cannot be read: {error.strerror}: run foretell calibrate"
            ) from None
        except ValueError:
            raise ConfigError(f"the profile {path} is no JSON: run foretell calibrate again") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, name: str) -> Profile:
        """From parsed JSON; ``name`` is for the ConfigError."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ConfigError(f"the profile {name} is of another version: run foretell calibrate again")
        try:
            values: dict[str, Any] = {one.name: data[one.name] for one in fields(cls) if one.name not in ADDED}
            values |= {name: data[name] for name in ADDED & data.keys()}
            values |= {name: Curve.from_dict(data[name]) for name in CURVES}
            values |= {name: Surface.from_dict(data[name]) for name in SURFACES}
            own = data["decode_linear"]
            values["decode_linear"] = None if own is None else Curve.from_dict(own)
            values["graph_sizes"] = tuple(data["graph_sizes"])
            values["intervals"] = {kind: (low, high) for kind, (low, high) in data["intervals"].items()}
            return cls(**{**values, "spec": spec_from_dict(data["spec"])})
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"the profile {name} is damaged ({error}): run foretell calibrate again") from None


def spec_from_dict(data: dict[str, Any]) -> ModelSpec:
    """What ``asdict`` makes of a ModelSpec, as JSON gives it back."""
    ropes = {
        name: None if data.get(name) is None else RopeSpec(**{**data[name], "freq_divisors": _pair(data[name])})
        for name in ("rope", "local_rope")
    }
    return ModelSpec(**{**data, **ropes, "windows": tuple(data["windows"])})


def _pair(rope: dict[str, Any]) -> tuple[float, ...]:
    return tuple(rope.get("freq_divisors", ()))


def attended(groups: tuple[KVGroup, ...], num_layers: int, start: int, length: int) -> float:
    """Query-key pairs of tokens [start, start + length) of a sequence, mean over the layers."""
    from foretell.cost.floor import visible_pairs

    return sum(len(group.layers) * visible_pairs(start, length, group.window) for group in groups) / num_layers
