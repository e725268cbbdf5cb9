"""GGUF files seen as Hugging Face checkpoints: metadata → config dict, tensor names → canonical names.

The families then serve both. What llama.cpp's converter changes on the way (row order of q and k, Gemma's
norms, fused layouts) is undone here; what its metadata leaves out is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from foretell.config import ModelSpec
from foretell.errors import ModelFormatError, UnsupportedModelError
from foretell.model.families import check_spec, resolve_spec
from foretell.model.hf_config import ConfigReader
from foretell.model.naming import Naming, interleaved_rows, stacked_gate_up, stacked_qkv
from foretell.store.tensors import TensorSource

Config = dict[str, Any]

_TOP = {"embedding": "token_embd", "positions": "position_embd", "final_norm": "output_norm"}
_PARTS = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.o": "attn_output",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
_FUSED = dict.fromkeys(("attention.q", "attention.k", "attention.v"), stacked_qkv("attn_qkv"))
_OVERRIDES: dict[str, Mapping[str, Any]] = {
    # llama.cpp rotates neighbours in these two and halves in all others
    "llama": {"attention.q": interleaved_rows("attn_q"), "attention.k": interleaved_rows("attn_k")},
    "granite": {"attention.q": interleaved_rows("attn_q"), "attention.k": interleaved_rows("attn_k")},
    "gpt2": _FUSED,
    "gptneox": _FUSED,
    "falcon": _FUSED,
    "phi3": {**_FUSED, **dict.fromkeys(("mlp.gate", "mlp.up"), stacked_gate_up("ffn_up"))},
}
_SLIDING = ("gemma3", "phi3")  # where converters state a window and llama.cpp heeds it
_SECOND_NORM = "blk.0.attn_norm_2.weight"
_SCALING_KEYS = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}


def gguf_naming(architecture: str, names: Collection[str]) -> Naming:
    """What a GGUF file of this general.architecture calls the canonical weights."""
    parts = {**_PARTS, **_OVERRIDES.get(architecture, {})}
    if architecture == "falcon" and _SECOND_NORM in names:  # the 40B form: attn_norm is the MLP's
        parts |= {"attention_norm": "attn_norm_2", "mlp_norm": "attn_norm"}
    return Naming(_TOP, parts, layer="blk.{}.", head="output", roots=("",), ignored=(r"rope_freqs\.weight",))


def gguf_architecture(metadata: Mapping[str, Any]) -> str:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelFormatError("GGUF metadata has no general.architecture")
    if name not in _FAMILY_CONFIGS:
        raise UnsupportedModelError(
            f"GGUF architecture {name[:60]!r} is not implemented; supported: {', '.join(_FAMILY_CONFIGS)}"
        )
    return name


def gguf_spec(source: TensorSource) -> ModelSpec:
    """The spec of a GGUF file, from its metadata and, for what that omits, its tensors."""
    spec = resolve_spec(gguf_config(source))
    if "rope_freqs.weight" not in source.names() or spec.rope is None:
        return spec
    if spec.rope.scaling != "none":
        raise UnsupportedModelError(f"GGUF rope scaling {spec.rope.scaling} with rope_freqs is not implemented")
    import torch  # here alone: `inspect` reads other GGUF headers without it

    divisors = source.read("rope_freqs.weight", torch.float32).flatten().tolist()
    spec = replace(spec, rope=replace(spec.rope, freq_divisors=tuple(divisors)))
    check_spec(spec, "GGUF rope_freqs.weight")
    return spec


def gguf_config(source: TensorSource) -> Config:
    """An equivalent config.json."""
    architecture = gguf_architecture(source.metadata)
    prefix = architecture + "."
    fields = {k[len(prefix) :]: v for k, v in source.metadata.items() if k.startswith(prefix)}
    names = set(source.names())
    if "token_embd.weight" not in names or len(source.shape("token_embd.weight")) != 2:
        raise ModelFormatError("GGUF tensor 'token_embd.weight' [vocab, hidden] is missing")
    meta = ConfigReader(fields, architecture, "GGUF metadata")
    if "rope_factors_short.weight" in names or "rope_factors_long.weight" in names:
        raise meta.unsupported("longrope scaling (rope_factors tensors)", "none, linear, yarn")
    if architecture not in _SLIDING and meta.integer("attention.sliding_window", 0, at_least=0):  # Olmo 3, e.g.
        raise meta.unsupported("attention.sliding_window in this architecture", ", ".join(_SLIDING))
    heads, head_dim = _head_shape(meta)
    config: Config = {
        "num_hidden_layers": meta.integer("block_count"),
        "hidden_size": meta.integer("embedding_length"),
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "vocab_size": source.shape("token_embd.weight")[0],
        "max_position_embeddings": meta.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "rope_theta": meta.number("rope.freq_base", 10000.0, above=1.0),
        "rope_scaling": _rope_scaling(meta),
        "num_local_experts": fields.get("expert_count") or None,
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
    }
    return config | _FAMILY_CONFIGS[architecture](meta, names, config, head_dim)


def _head_shape(meta: ConfigReader) -> tuple[int, int]:
    """(heads, head_dim); without a key_length head_dim is hidden/heads in every architecture."""
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    if not meta.has("attention.key_length") and hidden % heads:
        raise meta.malformed("embedding_length", f"a multiple of attention.head_count = {heads}")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    if meta.integer("attention.value_length", head_dim) != head_dim:
        raise meta.unsupported(f"value_length other than key_length = {head_dim}", "equal lengths")
    return heads, head_dim


def _rope_scaling(meta: ConfigReader) -> Config | None:
    for key in meta.config:
        if key.startswith("rope.scaling.") and key.removeprefix("rope.scaling.") not in _SCALING_KEYS:
            raise meta.unsupported(key, ", ".join(sorted(_SCALING_KEYS)))
    kind = meta.text("rope.scaling.type", "linear" if meta.has("rope.scale_linear") else "none")
    if kind == "none":
        return None
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    scaling: Config = {"rope_type": kind, "factor": factor}
    for theirs, ours in (
        ("original_context_length", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if meta.has(f"rope.scaling.{theirs}"):
            scaling[ours] = meta.config[f"rope.scaling.{theirs}"]
    return scaling


def _rotated_share(meta: ConfigReader, head_dim: int) -> float:
    """partial_rotary_factor; the half keeps int(head_dim · share) from falling one short."""
    dims = meta.integer("rope.dimension_count", head_dim)
    return 1.0 if dims == head_dim else (dims + 0.5) / head_dim


FamilyConfig = Callable[[ConfigReader, Collection[str], Config, int], Config]


def _rms(architecture: str) -> FamilyConfig:
    """Families whose config needs nothing but the common fields."""

    def config(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
        return {
            "architectures": [architecture],
            "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
            "partial_rotary_factor": _rotated_share(meta, head_dim),
        }

    return config


def _phi3(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    window = meta.integer("attention.sliding_window", 0, at_least=0)
    return _rms("Phi3ForCausalLM")(meta, names, common, head_dim) | {"sliding_window": window or None}


def _granite(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    return _rms("GraniteForCausalLM")(meta, names, common, head_dim) | {
        "attention_multiplier": meta.number("attention.scale", head_dim**-0.5),
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
    }


GEMMA3_27B_LAYERS = 62  # the only size whose query scale is not 1/√head_dim but 1/√(hidden/heads)


def _gemma3(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    wide = common["num_hidden_layers"] == GEMMA3_27B_LAYERS
    scalar = common["hidden_size"] / common["num_attention_heads"] if wide else head_dim
    config = _rms("Gemma3ForCausalLM")(meta, names, common, head_dim) | {
        "query_pre_attn_scalar": scalar,
        "sliding_window": meta.integer("attention.sliding_window"),
        "rope_theta": meta.number("rope.freq_base", 1e6, above=1.0),
        "rope_local_base_freq": meta.number("rope.freq_base_swa", 1e4, above=1.0),
    }
    pattern = meta.config.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    else:
        config["sliding_window_pattern"] = pattern
    return config


def _gpt2(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": common["hidden_size"],
        "n_head": common["num_attention_heads"],
        "n_layer": common["num_hidden_layers"],
        "n_inner": common["intermediate_size"],
        "n_positions": common["max_position_embeddings"],
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon"),
    }


def _gptneox(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "layer_norm_eps": meta.number("attention.layer_norm_epsilon"),
        "rotary_emb_base": common["rope_theta"],
        "rotary_pct": _rotated_share(meta, head_dim),
        "use_parallel_residual": meta.flag("use_parallel_residual", True),
        "attention_bias": "blk.0.attn_qkv.bias" in names,
    }


def _starcoder2(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "norm_epsilon": meta.number("attention.layer_norm_epsilon"),
        "use_bias": common["attention_bias"],
        "partial_rotary_factor": _rotated_share(meta, head_dim),
    }


def _falcon(meta: ConfigReader, names: Collection[str], common: Config, head_dim: int) -> Config:
    """All forms as the newest one: it takes any number of KV heads and one or two norms."""
    return {
        "architectures": ["FalconForCausalLM"],
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 2 if _SECOND_NORM in names else 1,
        "num_kv_heads": common["num_key_value_heads"],
        "ffn_hidden_size": common["intermediate_size"],
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon"),
        "bias": "blk.0.attn_qkv.bias" in names,
        "partial_rotary_factor": _rotated_share(meta, head_dim),
    }


_FAMILY_CONFIGS: dict[str, FamilyConfig] = {
    "llama": _rms("LlamaForCausalLM"),  # mistral files too
    "qwen2": _rms("Qwen2ForCausalLM"),
    "qwen3": _rms("Qwen3ForCausalLM"),
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _rms("Olmo2ForCausalLM"),
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "starcoder2": _starcoder2,
    "falcon": _falcon,
}
