"""Families descended from Llama: RMS norms, rotary positions, gated MLP, separate or fused projections."""

from __future__ import annotations

import math
from typing import Any

from foretell.config import ModelSpec, RopeSpec
from foretell.model.hf_config import ConfigReader, read_rope
from foretell.model.naming import Naming, plus_one, stacked_gate_up, stacked_qkv

INVERSE_FREQUENCIES = r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)"  # tables that old versions kept

_PROJECTIONS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_TOP = {"embedding": "embed_tokens", "final_norm": "norm"}

LLAMA_NAMES = Naming(
    _TOP,
    {**_PROJECTIONS, "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    ignored=(INVERSE_FREQUENCIES,),
)
OLMO2_NAMES = Naming(
    _TOP,
    {
        **_PROJECTIONS,
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    ignored=(INVERSE_FREQUENCIES,),
)
PHI3_NAMES = Naming(
    _TOP,
    {
        **LLAMA_NAMES.parts,
        **dict.fromkeys(("attention.q", "attention.k", "attention.v"), stacked_qkv("self_attn.qkv_proj")),
        **dict.fromkeys(("mlp.gate", "mlp.up"), stacked_gate_up("mlp.gate_up_proj")),
    },
    ignored=(INVERSE_FREQUENCIES,),
)
GEMMA3_NAMES = Naming(
    {"embedding": "embed_tokens", "final_norm": plus_one("norm")},
    {
        **_PROJECTIONS,
        "attention_norm": plus_one("input_layernorm"),
        "attention_post_norm": plus_one("post_attention_layernorm"),
        "mlp_norm": plus_one("pre_feedforward_layernorm"),
        "mlp_post_norm": plus_one("post_feedforward_layernorm"),
        "attention.q_norm": plus_one("self_attn.q_norm"),
        "attention.k_norm": plus_one("self_attn.k_norm"),
    },
    # the last two: the text half of a multimodal checkpoint, as transformers 4 and 5 name it
    roots=("model.", "", "language_model.model.", "model.language_model."),
    ignored=(
        INVERSE_FREQUENCIES,
        r"(model\.)?(vision_tower|multi_modal_projector)\..*",
        r"language_model\.lm_head\.weight",
    ),
)


def _common(
    config: ConfigReader,
    family: str,
    *,
    eps: float = 1e-6,
    positions: int = 2048,
    tied: bool = False,
    head_dim: int | None = None,
    kv_heads: int | None = None,
) -> dict[str, Any]:
    """The fields that all of these families share; arguments are the defaults for absent keys."""
    layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    hidden = config.integer("hidden_size")
    if head_dim is None and not config.has("head_dim"):
        if hidden % heads:
            raise config.malformed("hidden_size", f"a multiple of num_attention_heads = {heads}")
        head_dim = hidden // heads
    dim = config.integer("head_dim", head_dim)
    if "num_key_value_heads" in config.config:  # null there means MHA, absence the family's default
        kv_heads = heads
    return {
        "family": family,
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": config.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": config.integer("num_key_value_heads", kv_heads or heads),
        "head_dim": dim,
        "vocab_size": config.integer("vocab_size"),
        "max_position_embeddings": config.integer("max_position_embeddings", positions),
        "norm_eps": config.number("rms_norm_eps", eps),
        "activation": config.activation("hidden_act", "silu"),
        "attention_scale": dim**-0.5,
        "tied_embeddings": config.flag("tie_word_embeddings", tied),
    }


def _all_full(config: ConfigReader, fields: dict[str, Any]) -> tuple[int | None, ...]:
    return config.windows(fields["num_layers"], None, [False] * fields["num_layers"])


def _rope(config: ConfigReader, fields: dict[str, Any]) -> RopeSpec:
    return read_rope(config, fields["head_dim"])


def llama(config: ConfigReader) -> ModelSpec:
    fields = _common(config, "llama")
    bias = config.flag("attention_bias", False)
    return ModelSpec(
        **fields,
        windows=_all_full(config, fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        rope=_rope(config, fields),
    )


def mistral(config: ConfigReader) -> ModelSpec:
    """Llama with a sliding window on every layer (Jiang et al. 2023), where the config sets one."""
    fields = _common(config, "mistral", positions=131072, kv_heads=8)
    layers, window = fields["num_layers"], config.window(default=4096)
    fields["windows"] = config.windows(layers, window, [window is not None] * layers)
    return ModelSpec(**fields, rope=_rope(config, fields))


def _qwen(config: ConfigReader, fields: dict[str, Any]) -> dict[str, Any]:
    """The window, if switched on, holds for the layers from max_window_layers on."""
    window = config.window(default=4096) if config.flag("use_sliding_window", False) else None
    layers, first = fields["num_layers"], config.integer("max_window_layers", 28, at_least=0)
    sliding = [window is not None and i >= first for i in range(layers)]
    return {**fields, "windows": config.windows(layers, window, sliding), "rope": _rope(config, fields)}


def qwen2(config: ConfigReader) -> ModelSpec:
    """Llama with biases on q, k and v."""
    fields = _common(config, "qwen2", positions=32768, kv_heads=32)
    return ModelSpec(**_qwen(config, fields), qkv_bias=True)


def qwen3(config: ConfigReader) -> ModelSpec:
    """Llama with an RMS norm on every query and key head, and head_dim of its own."""
    fields = _common(config, "qwen3", positions=32768, head_dim=128, kv_heads=32)
    bias = config.flag("attention_bias", False)
    return ModelSpec(**_qwen(config, fields), qk_norm="head", qkv_bias=bias, o_bias=bias)


def phi3(config: ConfigReader) -> ModelSpec:
    """Llama with fused projections; may rotate part of a head and slide a window over all layers."""
    fields = _common(config, "phi3", eps=1e-5, positions=4096)
    layers, window = fields["num_layers"], config.window()
    fields["windows"] = config.windows(layers, window, [window is not None] * layers)
    partial = config.number("partial_rotary_factor", 1.0)
    rope = read_rope(config, fields["head_dim"], partial=partial)
    if rope.scaling != "none":
        raise config.unsupported(f"rope type {rope.scaling}", "default")
    return ModelSpec(**fields, rope=rope)


def granite(config: ConfigReader) -> ModelSpec:
    """Llama with four scalars (from μP): on embeddings, attention scores, residual branches and logits."""
    fields = _common(config, "granite")
    bias = config.flag("attention_bias", False)
    fields["attention_scale"] = config.number("attention_multiplier", 1.0)
    return ModelSpec(
        **fields,
        windows=_all_full(config, fields),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        rope=_rope(config, fields),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
        logits_divisor=config.number("logits_scaling", 1.0),
    )


def olmo2(config: ConfigReader) -> ModelSpec:
    """Norms behind the halves instead of before them, and over the whole q and k projections."""
    fields = _common(config, "olmo2", eps=1e-5)
    bias = config.flag("attention_bias", False)
    return ModelSpec(
        **fields,
        windows=_all_full(config, fields),
        norm_placement="post",
        qk_norm="full",
        qkv_bias=bias,
        o_bias=bias,
        rope=_rope(config, fields),
    )


def gemma3(config: ConfigReader) -> ModelSpec:
    """Five sliding layers to one full, each kind with a rotary base of its own; norms on both sides of the
    halves; embeddings scaled by √hidden (Gemma team 2025)."""
    if config.has("text_config"):  # the multimodal model; its text half is an ordinary Gemma 3
        text = {**_GEMMA3_TEXT_DEFAULTS, **config.mapping("text_config")}
        config = ConfigReader(text, config.architecture, "text_config")
        config.refuse_options()
    config = config.replaced(hidden_act=config.text("hidden_activation", "gelu_pytorch_tanh"))
    fields = _common(config, "gemma3", positions=131072, tied=True, head_dim=256, kv_heads=4)
    layers, dim = fields["num_layers"], fields["head_dim"]
    pattern_key = "sliding_window_pattern" if config.has("sliding_window_pattern") else "_sliding_window_pattern"
    pattern = config.integer(pattern_key, 6)
    sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    bias = config.flag("attention_bias", False)
    fields["windows"] = config.windows(layers, config.window(default=4096), sliding)
    fields["attention_scale"] = config.number("query_pre_attn_scalar", 256) ** -0.5
    return ModelSpec(
        **fields,
        norm_placement="sandwich",
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        rope=read_rope(config, dim, layer_type="full_attention", default_theta=1e6),
        local_rope=read_rope(
            config, dim, layer_type="sliding_attention", theta_key="rope_local_base_freq", default_theta=1e4
        ),
        embedding_multiplier=math.sqrt(fields["hidden_size"]),
    )


# Multimodal configs leave out what equals the defaults of the text model.
_GEMMA3_TEXT_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208}
