"""Which profile a name means: a file, this machine's own, one that ships with the package, or a data sheet."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from foretell.config import ModelSpec
from foretell.cost.analytic import analytic_profile
from foretell.cost.devices import DEVICES
from foretell.cost.floor import WeightBytes
from foretell.cost.hardware import BYTES_PER_ELEMENT
from foretell.cost.profile import Profile
from foretell.cost.scaled import MOST, distance, scaled_profile
from foretell.errors import ConfigError

ANALYTIC = "analytic:"


def own_path(model: str) -> Path:
    """Where a model's calibration on this machine is kept."""
    from foretell.store.cache import cache_home

    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in model)
    return cache_home() / "profiles" / f"{name}.json"


def refitted_path(model: str) -> Path:
    """Where the live check keeps what its steps say the calibration should be."""
    return own_path(model).with_suffix(".refitted.json")


def open_profile(
    name: str | Path | None,
    spec: ModelSpec,
    *,
    model: str,
    dtype: str = "bfloat16",
    weights: WeightBytes | None = None,
    weight_format: str | None = None,
) -> Profile:
    """The profile of ``spec`` under this name; ConfigError, in one line, where there is none.

    None: the model's own calibration on this machine. A path: that file. "cpu", "h200" …: what ships with the
    package, scaled operator by operator where it was made for another model; the data sheet where nothing of that
    device was measured, or of layers too unlike; "analytic:h200": the data sheet in any case.
    """
    if name is None:
        if not own_path(model).exists():
            raise ConfigError(
                f"{model} was never measured on this machine: run foretell calibrate with it (some minutes), or take "
                f"another machine's figures with --profile {'|'.join(sorted(shipped()))}"
            )
        return _from_file(own_path(model), spec, model)
    text = str(name)
    analytic = text.startswith(ANALYTIC)
    key = text.removeprefix(ANALYTIC).lower()
    if not analytic and key in shipped():
        found = nearest(key, spec, dtype, weight_format)
        if found is not None:
            return found if found.spec == spec else scaled_profile(found, spec, model)
    if key in DEVICES:
        if dtype not in BYTES_PER_ELEMENT:
            raise ConfigError(f"dtype {dtype!r} is unknown: choose one of {', '.join(BYTES_PER_ELEMENT)}")
        return analytic_profile(
            spec, DEVICES[key], dtype, key=key, model=model, weights=weights, weight_format=weight_format
        )
    if analytic or (key in shipped() and not Path(text).exists()):
        known = ", ".join(DEVICES)
        why = "is no device" if analytic else f"has no profile of layers like those of {model}"
        raise ConfigError(f"{text} {why}: name one of {known}, or calibrate this model")
    if not Path(text).exists() and not _looks_like_a_path(text):
        raise ConfigError(f"there is no profile {text!r}: name a file, {', '.join(sorted({*shipped(), *DEVICES}))}")
    return _from_file(Path(text), spec, model)


def find_profile(
    spec: ModelSpec, *, model: str, kernels: str, weight_format: str, num_threads: int = 0
) -> Profile | None:
    """This machine's own calibration of exactly this engine; None without a word if there is none that fits."""
    path = own_path(model)
    if not path.is_file():
        return None
    try:
        found = Profile.load(path)
    except ConfigError:
        return None
    fits = (found.spec, found.kernels, found.weight_format) == (spec, kernels, weight_format)
    return found if fits and num_threads in (0, found.num_threads) else None


@cache
def shipped() -> dict[str, tuple[str, ...]]:
    """Name of a device → the files that ship of it."""
    folder = files("foretell.cost") / "profiles"
    if not folder.is_dir():
        return {}
    return {
        one.name: tuple(sorted(file.name for file in one.iterdir() if file.name.endswith(".json")))
        for one in folder.iterdir()
        if one.is_dir() and not one.name.startswith("_")
    }


def nearest(key: str, spec: ModelSpec, dtype: str, weight_format: str | None) -> Profile | None:
    """Of the shipped profiles of a device, that of the most similar layers, its weights kept in the same format
    if one is named; None if all are too unlike."""
    found = [_load_shipped(key, file) for file in shipped()[key]]
    same = [one for one in found if weight_format in (None, one.weight_format)]
    exact = [one for one in same if one.spec == spec]
    if exact:
        return exact[0]
    near = [one for one in same if distance(one, spec) <= MOST]
    return min(near, key=lambda one: distance(one, spec), default=None)


def _load_shipped(key: str, file: str) -> Profile:
    text = (files("foretell.cost") / "profiles" / key / file).read_text(encoding="utf-8")
    return replace(Profile.from_dict(json.loads(text), f"{key}/{file}"), device=key if key in DEVICES else "")


def _from_file(path: Path, spec: ModelSpec, model: str) -> Profile:
    found = Profile.load(path)
    return found if found.spec == spec else scaled_profile(found, spec, model)


def _looks_like_a_path(text: str) -> bool:
    return text.endswith(".json") or "/" in text
