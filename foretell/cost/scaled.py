"""One model's profile for another model: operator by operator, by what each of them moves or computes.

A layer of the same shapes takes the same time in both, so the number of layers is all that counts; the head goes by
its matrix, attention by the bytes of keys and values (decode) or by operations (prefill). Where layers have other
shapes, linear layers go by their parameters, which is nearly right only for layers of about the same size: the
interval widens, and beyond a factor of ``MOST`` nothing is said.
"""

from __future__ import annotations

from dataclasses import replace

from foretell.config import ModelSpec
from foretell.cost.operations import MATRICES
from foretell.cost.profile import Profile
from foretell.errors import ConfigError
from foretell.model.parameters import count_parameters, layer_weight_shapes

MOST = 4.0  # times larger or smaller may a layer be
SAME_SHAPES, OTHER_SHAPES = 1.5, 3.0  # times wider is the interval then, and at least so wide:
LEAST_SAME, LEAST_OTHER = 0.05, 0.25  # llama-2-7b from llama-3.1-8b on an H200 was 17 and 8 % off


def layer_parameters(spec: ModelSpec) -> int:
    """Of the matrices of one layer."""
    layer = count_parameters(spec).layer
    return sum(layer.get(part, 0) for part in MATRICES)


def same_layers(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether every operator of a layer has the same shape in both; windows are counted key by key anyway."""
    heads = (one.num_heads, one.num_kv_heads, one.head_dim) == (other.num_heads, other.num_kv_heads, other.head_dim)
    return heads and layer_weight_shapes(one) == layer_weight_shapes(other)


def distance(profile: Profile, spec: ModelSpec) -> float:
    """How unlike the profile's layers are: 0 for the same shapes, else the factor between their sizes, from 1 on."""
    if same_layers(profile.spec, spec):
        return 0.0
    ratio = layer_parameters(spec) / layer_parameters(profile.spec)
    return max(ratio, 1 / ratio)


def scaled_profile(profile: Profile, spec: ModelSpec, model: str) -> Profile:
    """ConfigError if the layers are too unlike, or if the profile is itself a guess."""
    apart = distance(profile, spec)
    if apart > MOST:
        raise ConfigError(
            f"the profile was made for {profile.model}, whose layers are {apart:.1f} times larger or smaller: "
            "calibrate this model"
        )
    old = profile.spec
    linear = spec.num_layers * layer_parameters(spec) / (old.num_layers * layer_parameters(old))
    head = spec.vocab_size * spec.hidden_size / (old.vocab_size * old.hidden_size)
    keys = spec.kv_bytes_per_token(1) / old.kv_bytes_per_token(1)
    pairs = spec.num_layers * spec.num_heads * spec.head_dim / (old.num_layers * old.num_heads * old.head_dim)
    wider, least = (SAME_SHAPES, LEAST_SAME) if apart == 0 else (OTHER_SHAPES, LEAST_OTHER)

    def bounds(low: float, high: float) -> tuple[float, float]:
        widest = max(0.0, 1 + (low - 1) * wider)
        return min(widest, 1 - least), max(1 + (high - 1) * wider, 1 + least)

    low, high = bounds(profile.low, profile.high)
    own = profile.decode_linear
    alike = "layers of the same shapes" if apart == 0 else f"layers of {apart:.2g} times the size"
    return replace(
        profile,
        model=model,
        spec=spec,
        linear=profile.linear.scaled(linear),
        decode_linear=None if own is None else own.scaled(linear),
        head=profile.head.scaled(head),
        decode_rate=profile.decode_rate.scaled(keys),
        prefill_rate=profile.prefill_rate.scaled(pairs),
        eager_seconds=profile.eager_seconds * spec.num_layers / old.num_layers,
        low=low,
        high=high,
        intervals={kind: bounds(*measured) for kind, measured in profile.intervals.items()},
        source="scaled",
        reference_seconds=0.0,  # of another model's step
        weight_bytes=0,
        note=f"scaled from {profile.model} ({alike})",
    )
