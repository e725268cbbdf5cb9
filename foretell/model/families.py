"""The table of architectures: how each one's config becomes a spec and where its weights lie.

To add a family, write a function config → ModelSpec and a Naming, and enter both here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from foretell.config import ModelSpec, RopeSpec
from foretell.errors import ModelFormatError, UnsupportedModelError
from foretell.model import gpt_like, llama_like
from foretell.model.hf_config import ConfigReader
from foretell.model.naming import Naming

MAX_LAYERS = 4096  # a corrupt count must not become a list of a billion windows


@dataclass(frozen=True, slots=True)
class Family:
    """One row: ``spec`` reads the config, ``naming`` says what Hugging Face checkpoints call the weights."""

    name: str  # ModelSpec.family
    model_type: str  # config.json's model_type
    architectures: tuple[str, ...]  # the first is the canonical one
    spec: Callable[[ConfigReader], ModelSpec]
    naming: Callable[[ModelSpec], Naming]


def _row(
    stem: str,
    spec: Callable[[ConfigReader], ModelSpec],
    naming: Naming | Callable[[ModelSpec], Naming],
    *,
    name: str = "",
    model_type: str = "",
    architectures: tuple[str, ...] = (),
) -> Family:
    """A family whose classes are called after one stem, unless said otherwise."""
    name = name or stem.lower()
    found = naming if callable(naming) else lambda spec: naming
    usual = (f"{stem}ForCausalLM", f"{stem}Model")
    return Family(name, model_type or name, architectures or usual, spec, found)


GEMMA3 = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel")
GPT2 = ("GPT2LMHeadModel", "GPT2Model")

FAMILIES = (
    _row("Llama", llama_like.llama, llama_like.LLAMA_NAMES),
    _row("Mistral", llama_like.mistral, llama_like.LLAMA_NAMES),
    _row("Qwen2", llama_like.qwen2, llama_like.LLAMA_NAMES),
    _row("Qwen3", llama_like.qwen3, llama_like.LLAMA_NAMES),
    _row("Gemma3", llama_like.gemma3, llama_like.GEMMA3_NAMES, model_type="gemma3_text", architectures=GEMMA3),
    _row("Phi3", llama_like.phi3, llama_like.PHI3_NAMES),
    _row("Granite", llama_like.granite, llama_like.LLAMA_NAMES),
    _row("Olmo2", llama_like.olmo2, llama_like.OLMO2_NAMES),
    _row("GPT2", gpt_like.gpt2, gpt_like.GPT2_NAMES, architectures=GPT2),
    _row("GPTNeoX", gpt_like.gpt_neox, gpt_like.GPT_NEOX_NAMES, name="gpt_neox"),
    _row("Starcoder2", gpt_like.starcoder2, gpt_like.STARCODER2_NAMES),
    _row("Falcon", gpt_like.falcon, gpt_like.falcon_names),
)

BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
BY_NAME = {family.name: family for family in FAMILIES}


def supported_architectures() -> tuple[str, ...]:
    return tuple(family.architectures[0] for family in FAMILIES)


def resolve_spec(config: Mapping[str, Any]) -> ModelSpec:
    """A Hugging Face config.json, of transformers 4 or 5, → spec.

    Raises UnsupportedModelError for an architecture or option that is not implemented, ModelFormatError
    for fields that are missing, of the wrong type or in contradiction; both in one line.
    """
    if not isinstance(config, Mapping):
        raise ModelFormatError(f"a model config must be a mapping, not {type(config).__name__}")
    architecture, family = _family_of(config)
    reader = ConfigReader(config, architecture)
    reader.refuse_options()
    if reader.integer("num_hidden_layers", 1) > MAX_LAYERS or reader.integer("n_layer", 1) > MAX_LAYERS:
        raise ModelFormatError(f"{architecture} config: more than {MAX_LAYERS} layers is not believable")
    spec = family.spec(reader)
    check_spec(spec, architecture)
    return spec


def _family_of(config: Mapping[str, Any]) -> tuple[str, Family]:
    names = config.get("architectures")
    if names is None:
        names = []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelFormatError(f"config: architectures must be a list of names, not {str(names)[:60]}")
    for name in names:
        if name in BY_ARCHITECTURE:
            return name, BY_ARCHITECTURE[name]
    kind = config.get("model_type")
    if not names and isinstance(kind, str) and kind in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[kind].architectures[0], BY_MODEL_TYPE[kind]
    wanted = ", ".join(names) or f"model_type {str(kind)[:60]!r}"
    raise UnsupportedModelError(
        f"architecture {wanted[:200]} is not implemented; supported: {', '.join(supported_architectures())}"
    )


def check_spec(spec: ModelSpec, architecture: str) -> None:
    """What every kernel assumes; a spec made by hand or from a file must hold to it."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ModelFormatError(f"{architecture} config: {message}")

    sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    for name in sizes:
        require(getattr(spec, name) > 0, f"{name} = {getattr(spec, name)} must be positive")
    require(
        spec.num_heads % spec.num_kv_heads == 0,
        f"{spec.num_heads} query heads do not divide among {spec.num_kv_heads} key/value heads",
    )
    require(len(spec.windows) == spec.num_layers, f"{len(spec.windows)} windows for {spec.num_layers} layers")
    require(all(w is None or w > 0 for w in spec.windows), "sliding windows must be positive")
    require(not (spec.shared_block_norm and not spec.parallel_block), "a shared norm needs parallel halves")
    for rope in (spec.rope, spec.local_rope):
        require(rope is None or _sound(rope, spec.head_dim), f"impossible rotary embedding {rope}")


def _sound(rope: RopeSpec, head_dim: int) -> bool:
    dims = rope.dim >= 2 and rope.dim % 2 == 0 and rope.dim <= head_dim
    divisors = len(rope.freq_divisors) in (0, rope.dim // 2) and all(d > 0 for d in rope.freq_divisors)
    return dims and divisors and rope.theta > 1 and rope.factor > 0


def tensor_naming(spec: ModelSpec) -> Naming:
    """What Hugging Face checkpoints of this spec's family call the weights."""
    return BY_NAME[spec.family].naming(spec)
