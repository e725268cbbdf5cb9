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


def _always(naming: Naming) -> Callable[[ModelSpec], Naming]:
    return lambda spec: naming


FAMILIES = (
    Family("llama", "llama", ("LlamaForCausalLM", "LlamaModel"), llama_like.llama, _always(llama_like.LLAMA_NAMES)),
    Family(
        "mistral", "mistral", ("MistralForCausalLM", "MistralModel"), llama_like.mistral,
        _always(llama_like.LLAMA_NAMES),
    ),
    Family("qwen2", "qwen2", ("Qwen2ForCausalLM", "Qwen2Model"), llama_like.qwen2, _always(llama_like.LLAMA_NAMES)),
    Family("qwen3", "qwen3", ("Qwen3ForCausalLM", "Qwen3Model"), llama_like.qwen3, _always(llama_like.LLAMA_NAMES)),
    Family(
        "gemma3", "gemma3_text", ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextModel"),
        llama_like.gemma3, _always(llama_like.GEMMA3_NAMES),
    ),
    Family("phi3", "phi3", ("Phi3ForCausalLM", "Phi3Model"), llama_like.phi3, _always(llama_like.PHI3_NAMES)),
    Family(
        "granite", "granite", ("GraniteForCausalLM", "GraniteModel"), llama_like.granite,
        _always(llama_like.LLAMA_NAMES),
    ),
    Family("olmo2", "olmo2", ("Olmo2ForCausalLM", "Olmo2Model"), llama_like.olmo2, _always(llama_like.OLMO2_NAMES)),
    Family("gpt2", "gpt2", ("GPT2LMHeadModel", "GPT2Model"), gpt_like.gpt2, _always(gpt_like.GPT2_NAMES)),
    Family(
        "gpt_neox", "gpt_neox", ("GPTNeoXForCausalLM", "GPTNeoXModel"), gpt_like.gpt_neox,
        _always(gpt_like.GPT_NEOX_NAMES),
    ),
    Family(
        "starcoder2", "starcoder2", ("Starcoder2ForCausalLM", "Starcoder2Model"), gpt_like.starcoder2,
        _always(gpt_like.STARCODER2_NAMES),
    ),
    Family("falcon", "falcon", ("FalconForCausalLM", "FalconModel"), gpt_like.falcon, gpt_like.falcon_names),
)  # fmt: skip

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
