"""A calibration: what the engine's own operators take on one machine, for one model. Plain data in a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from foretell.config import KVGroup, ModelSpec, RopeSpec
from foretell.cost.grid import Curve, Surface
from foretell.errors import ConfigError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds of a step = linear(tokens) + head(sampled rows) + attention + host(sequences).

    ``linear``: everything that sees each token alone. ``decode_rate`` and ``prefill_rate``: seconds of attention per
    query-key pair, mean over the layers, by (sequences, keys of each) and (query tokens, keys before them).
    ``low`` and ``high``: between these multiples of the prediction lay 90 % of the held-out steps.
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

    def save(self, path: Path) -> None:
        data: dict[str, Any] = {"version": VERSION}
        for field in fields(self):
            value = getattr(self, field.name)
            data[field.name] = value.as_dict() if isinstance(value, (Curve, Surface)) else value
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
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ConfigError(f"the profile {path} is of another version: run foretell calibrate again")
        try:
            values: dict[str, Any] = {field.name: data[field.name] for field in fields(cls)}
            values |= {name: Curve.from_dict(data[name]) for name in ("linear", "head", "host")}
            values |= {name: Surface.from_dict(data[name]) for name in ("decode_rate", "prefill_rate")}
            return cls(**{**values, "spec": spec_from_dict(data["spec"])})
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"the profile {path} is damaged ({error}): run foretell calibrate again") from None

    def check_fits(self, spec: ModelSpec) -> None:
        """ConfigError unless the profile was made for a model of these shapes."""
        if spec != self.spec:
            raise ConfigError(
                f"the profile was made for {self.model}, whose shapes are others: calibrate for this model"
            )


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
