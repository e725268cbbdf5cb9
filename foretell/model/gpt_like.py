"""Families closer to the first GPTs: layer norms with biases, plain MLP, fused projections."""

from __future__ import annotations

from foretell.config import ModelSpec
from foretell.model.hf_config import ConfigReader, read_rope
from foretell.model.llama_like import INVERSE_FREQUENCIES
from foretell.model.naming import Naming, grouped_qkv, stacked_qkv, transposed

QKV = ("attention.q", "attention.k", "attention.v")

GPT2_NAMES = Naming(
    {"embedding": "wte", "positions": "wpe", "final_norm": "ln_f"},
    {
        "attention_norm": "ln_1",
        **dict.fromkeys(QKV, stacked_qkv("attn.c_attn", conv1d=True)),
        "attention.o": transposed("attn.c_proj"),
        "mlp_norm": "ln_2",
        "mlp.up": transposed("mlp.c_fc"),
        "mlp.down": transposed("mlp.c_proj"),
    },
    layer="h.{}.",
    roots=("transformer.", ""),
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),  # the causal mask, kept by old versions
)
GPT_NEOX_NAMES = Naming(
    {"embedding": "embed_in", "final_norm": "final_layer_norm"},
    {
        "attention_norm": "input_layernorm",
        **dict.fromkeys(QKV, grouped_qkv("attention.query_key_value")),
        "attention.o": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    head="embed_out",
    roots=("gpt_neox.", ""),
    ignored=(INVERSE_FREQUENCIES, r".*\.attention\.(masked_)?bias"),
)
STARCODER2_NAMES = Naming(
    {"embedding": "embed_tokens", "final_norm": "norm"},
    {
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    ignored=(INVERSE_FREQUENCIES,),
)


def _falcon_names(attention_norm: str, mlp_norm: str) -> Naming:
    return Naming(
        {"embedding": "word_embeddings", "final_norm": "ln_f"},
        {
            "attention_norm": attention_norm,
            **dict.fromkeys(QKV, grouped_qkv("self_attention.query_key_value")),
            "attention.o": "self_attention.dense",
            "mlp_norm": mlp_norm,
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        layer="h.{}.",
        roots=("transformer.", ""),
        ignored=(INVERSE_FREQUENCIES,),
    )


def falcon_names(spec: ModelSpec) -> Naming:
    """The norms of the 40B form (parallel, one for each half) have names of their own."""
    if spec.parallel_block and not spec.shared_block_norm:
        return _falcon_names("ln_attn", "ln_mlp")
    return _falcon_names("input_layernorm", "post_attention_layernorm")


def _heads(config: ConfigReader, hidden_key: str, heads_key: str) -> tuple[int, int, int]:
    hidden, heads = config.integer(hidden_key), config.integer(heads_key)
    if hidden % heads:
        raise config.malformed(hidden_key, f"a multiple of {heads_key} = {heads}")
    return hidden, heads, hidden // heads


def gpt2(config: ConfigReader) -> ModelSpec:
    """Learned positions, pre-norm, biases everywhere (Radford et al. 2019)."""
    hidden, heads, dim = _heads(config, "n_embd", "n_head")
    layers, positions = config.integer("n_layer"), config.integer("n_positions", 1024)
    scaled = config.flag("scale_attn_weights", True)
    return ModelSpec(
        family="gpt2",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=config.integer("n_inner", 4 * hidden),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=positions,
        windows=config.windows(layers, None, [False] * layers),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        activation=config.activation("activation_function", "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        learned_positions=positions,
        attention_scale=dim**-0.5 if scaled else 1.0,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def gpt_neox(config: ConfigReader) -> ModelSpec:
    """Rotary positions on part of each head; both halves read the same input (Black et al. 2022)."""
    hidden, heads, dim = _heads(config, "hidden_size", "num_attention_heads")
    layers, bias = config.integer("num_hidden_layers"), config.flag("attention_bias", True)
    partial = config.number("rotary_pct", 0.25)
    return ModelSpec(
        family="gpt_neox",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", 2048),
        windows=config.windows(layers, None, [False] * layers),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        norm_bias=True,
        parallel_block=config.flag("use_parallel_residual", True),
        activation=config.activation("hidden_act", "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        rope=read_rope(config, dim, theta_key="rotary_emb_base", partial=partial),
        attention_scale=dim**-0.5,
        tied_embeddings=config.flag("tie_word_embeddings", False),
    )


def starcoder2(config: ConfigReader) -> ModelSpec:
    """GQA and rotary positions with layer norms and a plain MLP; may slide a window over all layers."""
    hidden, heads, dim = _heads(config, "hidden_size", "num_attention_heads")
    layers, bias, window = config.integer("num_hidden_layers"), config.flag("use_bias", True), config.window()
    dim = config.integer("head_dim", dim)
    return ModelSpec(
        family="starcoder2",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", 2),
        head_dim=dim,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", 4096),
        windows=config.windows(layers, window, [window is not None] * layers),
        norm="layer",
        norm_eps=config.number("norm_epsilon", 1e-5),
        norm_bias=True,
        activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        rope=read_rope(config, dim),
        attention_scale=dim**-0.5,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )


def _falcon_shape(config: ConfigReader, heads: int) -> tuple[int, bool, bool]:
    """(KV heads, parallel block, one norm for both halves) of the three forms Falcon came in."""
    parallel = config.flag("parallel_attn", True)
    norms = config.integer("num_ln_in_parallel_attn", 0, at_least=0)
    if config.flag("new_decoder_architecture", False):
        if not parallel:
            raise config.unsupported("parallel_attn = false with new_decoder_architecture", "true")
        return config.integer("num_kv_heads", heads), True, norms == 1
    if parallel and norms == 2:
        raise config.unsupported("num_ln_in_parallel_attn = 2 without new_decoder_architecture", "1")
    return 1 if config.flag("multi_query", True) else heads, parallel, parallel


def falcon(config: ConfigReader) -> ModelSpec:
    """MQA (7B) or GQA (40B, 180B, Falcon 2) with parallel halves (Almazrouei et al. 2023)."""
    hidden, heads, dim = _heads(config, "hidden_size", "num_attention_heads")
    layers, bias = config.integer("num_hidden_layers"), config.flag("bias", False)
    kv_heads, parallel, shared = _falcon_shape(config, heads)
    return ModelSpec(
        family="falcon",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=config.integer("ffn_hidden_size", 4 * hidden),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=config.integer("max_position_embeddings", 2048),
        windows=config.windows(layers, None, [False] * layers),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        parallel_block=parallel,
        shared_block_norm=shared,
        activation=config.activation("activation", "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        rope=read_rope(config, dim),
        attention_scale=dim**-0.5,
        tied_embeddings=config.flag("tie_word_embeddings", True),
    )
