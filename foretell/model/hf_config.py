"""Reading a Hugging Face config.json without trust: every field is checked, every refusal is one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from foretell.config import Activation, RopeScaling, RopeSpec
from foretell.errors import ModelFormatError, UnsupportedModelError

LIMIT = 2**31  # no dimension of a model comes near; keeps a corrupt file from asking for absurd sizes
REQUIRED: Any = object()

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}

ROPE_TYPES: dict[str, RopeScaling] = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}

# Option → values that change nothing. Any other value asks for something that is not implemented.
REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "alibi": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "clip_qkv": (None,),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "mrope_section": (None,),
    "prefix_lm": (None, False),
    "qk_layernorm": (None, False),
}


class ConfigReader:
    """A config mapping with typed, checked access; ``where`` names it in messages."""

    def __init__(self, config: Mapping[str, Any], architecture: str, where: str = "config") -> None:
        self.config = config
        self.architecture = architecture
        self.where = where

    def replaced(self, **values: Any) -> ConfigReader:
        return ConfigReader({**self.config, **values}, self.architecture, self.where)

    def has(self, name: str) -> bool:
        return self.config.get(name) is not None

    def malformed(self, name: str, must: str) -> ModelFormatError:
        found = "is missing" if not self.has(name) else f"is {_short(self.config[name])}"
        return ModelFormatError(f"{self.architecture} {self.where}: {name} {found}; it must be {must}")

    def unsupported(self, option: str, supported: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.architecture} {self.where}: {option} is not implemented; supported: {supported}"
        )

    def integer(self, name: str, default: int | None = REQUIRED, *, at_least: int = 1) -> int:
        value = self.config.get(name)
        if value is None and default is not REQUIRED and default is not None:
            return default
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not at_least <= value < LIMIT:
            raise self.malformed(name, f"an integer of at least {at_least}")
        return value

    def number(self, name: str, default: float = REQUIRED, *, above: float = 0.0) -> float:
        value = self.config.get(name)
        if value is None and default is not REQUIRED:
            return default
        if type(value) is bool or not isinstance(value, (int, float)) or not above < value < 1e30:
            raise self.malformed(name, f"a finite number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.malformed(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.config.get(name)
        if value is None:
            return default
        if type(value) is not str:
            raise self.malformed(name, "a string")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.malformed(name, "a mapping")
        return value

    def activation(self, name: str, default: str) -> Activation:
        kind = self.text(name, default)
        if kind not in ACTIVATIONS:
            raise self.unsupported(f"{name} {_short(kind)}", ", ".join(ACTIVATIONS))
        return ACTIVATIONS[kind]

    def refuse_options(self) -> None:
        """Raise for any option that would change the result and that no family here implements."""
        for name, harmless in REFUSED.items():
            value = self.config.get(name)
            if not any(type(value) is type(h) and value == h for h in harmless):
                raise self.unsupported(f"{name} = {_short(value)}", "models without this option")

    def windows(self, layers: int, window: int | None, sliding: Sequence[bool]) -> tuple[int | None, ...]:
        """Window by layer: from ``layer_types`` where the config lists them, else from the family's pattern."""
        types = self.config.get("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != layers:
                raise self.malformed("layer_types", f"a list of {layers} strings")
            for kind in types:
                if kind not in ("full_attention", "sliding_attention"):
                    raise self.unsupported(f"layer type {_short(kind)}", "full_attention, sliding_attention")
            sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and window is None:
            raise self.malformed("sliding_window", "an integer, as layer_types has sliding layers")
        return tuple(window if s else None for s in sliding)

    def window(self, default: int | None = None) -> int | None:
        """The sliding window in tokens: an absent key means the family's default, null means none."""
        if "sliding_window" not in self.config:
            return default
        return self.integer("sliding_window") if self.has("sliding_window") else None


def read_rope(
    config: ConfigReader,
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    default_theta: float = 10000.0,
    partial: float | None = None,
) -> RopeSpec:
    """The rotary embedding from transformers-5 ``rope_parameters`` or 4.x ``rope_theta``/``rope_scaling``.

    ``layer_type`` picks one entry where parameters are nested by layer type. ``partial`` is the rotated
    share of a head, None in families whose implementation rotates whole heads only.
    """
    modern = config.mapping("rope_parameters")
    if layer_type is None and any(isinstance(value, Mapping) for value in modern.values()):
        raise config.unsupported("rope_parameters by layer type", "one rope for all layers in this family")
    if layer_type is not None and layer_type in modern:
        modern = ConfigReader(modern, config.architecture, "rope_parameters").mapping(layer_type)
    elif layer_type == "sliding_attention":
        modern = {}  # scaling given flat extends the full-attention layers alone
    legacy = config.mapping("rope_scaling") if layer_type != "sliding_attention" else {}
    merged = {**modern, **legacy}
    rope = ConfigReader(merged, config.architecture, "rope parameters")
    theta = rope.number("rope_theta", config.number(theta_key, default_theta), above=1.0)
    rotated = rope.number("partial_rotary_factor", partial or config.number("partial_rotary_factor", 1.0))
    if partial is None and rotated != 1.0:
        raise config.unsupported(f"partial_rotary_factor = {rotated}", "1 in this family")
    dim = int(head_dim * rotated)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ModelFormatError(
            f"{config.architecture} config: rotary dimension {dim} of head_dim {head_dim} must be even and at "
            "most head_dim"
        )
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_TYPES or rope.has("mrope_section"):
        name = kind if kind not in ROPE_TYPES else "with mrope_section"
        raise config.unsupported(f"rope type {_short(name)}", ", ".join(ROPE_TYPES))
    return _scaled_rope(rope, theta, dim, ROPE_TYPES[kind], config)


def _scaled_rope(rope: ConfigReader, theta: float, dim: int, scaling: RopeScaling, config: ConfigReader) -> RopeSpec:
    if scaling == "none":
        return RopeSpec(theta, dim)
    factor = rope.number("factor")
    if scaling == "linear":
        return RopeSpec(theta, dim, "linear", factor)
    length = "original_max_position_embeddings"  # beside the rope's parameters it counts more than among them
    trained = config.integer(length, rope.integer(length, config.integer("max_position_embeddings", 0) or REQUIRED))
    if scaling == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.malformed("high_freq_factor", "greater than low_freq_factor")
        return RopeSpec(theta, dim, "llama3", factor, trained, low, high)
    return RopeSpec(
        theta,
        dim,
        "yarn",
        factor,
        trained,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", _yarn_attention(rope, factor)),
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention(rope: ConfigReader, factor: float) -> float:
    """0.1·ln(factor) + 1 (Peng et al. 2023, eq. 22); DeepSeek's form is the ratio of two such terms."""

    def term(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.config.get("mscale") and rope.config.get("mscale_all_dim"):  # zero counts as absent
        return term(rope.number("mscale")) / term(rope.number("mscale_all_dim"))
    return term(1.0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
