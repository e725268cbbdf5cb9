"""Configs to specs: known sizes, both config styles, refusals by name, and no other exception on any input."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import ModelSpec, RopeSpec
from foretell.errors import ModelFormatError, UnsupportedModelError
from foretell.model.families import FAMILIES, resolve_spec, supported_architectures
from foretell.model.parameters import count_parameters, estimate_parameters, weight_shapes

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GEMMA_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "vocab_size": 262144,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
FALCON_7B: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "vocab_size": 65024,
}
PYTHIA_70M: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 50304,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
}
QWEN2_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "parameters", "attention"),
    [
        (LLAMA_8B, 8_030_261_248, "GQA"),
        (GEMMA_1B, 999_885_952, "MQA"),
        (GPT2, 124_439_808, "MHA"),
        (FALCON_7B, 6_921_720_704, "MQA"),
        (PYTHIA_70M, 70_426_624, "MHA"),
        (QWEN2_05B, 494_032_768, "GQA"),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else None,
)
def test_published_parameter_counts(config: dict[str, Any], parameters: int, attention: str) -> None:
    spec = resolve_spec(config)
    counts = count_parameters(spec)
    assert counts.total == parameters
    assert spec.attention_kind == attention
    estimate = estimate_parameters(spec)
    assert abs(estimate.total - parameters) / parameters < 0.01
    assert f"{estimate.twelve_h_squared:,}" in estimate.explanation


def test_twelve_h_squared_is_exact_for_gpt2_matrices() -> None:
    spec = resolve_spec(GPT2)
    estimate = estimate_parameters(spec)
    assert spec.num_layers * (estimate.attention_per_layer + estimate.mlp_per_layer) == estimate.twelve_h_squared


def test_counts_by_component() -> None:
    counts = count_parameters(resolve_spec(LLAMA_8B))
    assert counts.layer == {
        "attention.q": 4096 * 4096,
        "attention.k": 4096 * 1024,
        "attention.v": 4096 * 1024,
        "attention.o": 4096 * 4096,
        "mlp.gate": 4096 * 14336,
        "mlp.up": 4096 * 14336,
        "mlp.down": 4096 * 14336,
        "norms": 2 * 4096,
    }
    assert (counts.embedding, counts.head, counts.final_norm) == (128256 * 4096, 128256 * 4096, 4096)
    assert count_parameters(resolve_spec(GEMMA_1B)).head == 0


def test_gemma_pattern_and_ropes() -> None:
    spec = resolve_spec(GEMMA_1B)
    assert [layer for layer, window in enumerate(spec.windows) if window is None] == [5, 11, 17, 23]
    assert {window for window in spec.windows if window} == {512}
    assert spec.rope == RopeSpec(1e6, 256)
    assert spec.local_rope == RopeSpec(1e4, 256)
    assert spec.embedding_multiplier == 1152**0.5


def test_both_config_styles_say_the_same() -> None:
    modern = {
        key: value for key, value in LLAMA_8B.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    modern |= {"rope_parameters": LLAMA_8B["rope_scaling"] | {"rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert resolve_spec(modern) == resolve_spec(LLAMA_8B)
    gone = ("rope_theta", "rope_local_base_freq", "sliding_window_pattern")
    gemma = {key: value for key, value in GEMMA_1B.items() if key not in gone}
    gemma |= {
        "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert resolve_spec(gemma) == resolve_spec(GEMMA_1B)
    scaled = GEMMA_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert resolve_spec(scaled).rope == RopeSpec(1e6, 256, "linear", 8.0)
    assert resolve_spec(scaled).local_rope == RopeSpec(1e4, 256)


def test_the_length_a_model_was_trained_for_may_stand_beside_the_rope() -> None:
    """As transformers has it, there it counts more than within rope_scaling, and more than the present context."""
    yarn = LLAMA_8B | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32768}
    inside = LLAMA_8B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    assert resolve_spec(yarn) == resolve_spec(inside)
    assert resolve_spec(inside | {"original_max_position_embeddings": 4096}).rope != resolve_spec(inside).rope


def test_multimodal_gemma_takes_the_defaults_of_its_text_half() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    spec = resolve_spec({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)


def test_architecture_from_model_type_alone() -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key != "architectures"}
    assert resolve_spec(config) == resolve_spec(LLAMA_8B)


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (LLAMA_8B, {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*LlamaForCausalLM"),
        (LLAMA_8B, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        (LLAMA_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA_8B, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters by layer type"),
        (LLAMA_8B, {"hidden_act": "relu2"}, "relu2"),
        (LLAMA_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA_8B, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA_8B, {"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        (QWEN2_05B, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        (QWEN2_05B, {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope"),
        (GEMMA_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (FALCON_7B, {"alibi": True}, "alibi"),
        (FALCON_7B, {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
    ],
)
def test_refused_by_name(base: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        resolve_spec(base | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (LLAMA_8B, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA_8B, {"hidden_size": -1}, "hidden_size is -1"),
        (LLAMA_8B, {"hidden_size": "4096"}, "hidden_size is '4096'"),
        (LLAMA_8B, {"hidden_size": True}, "hidden_size is True"),
        (LLAMA_8B, {"hidden_size": 4097}, "multiple of num_attention_heads"),
        (LLAMA_8B, {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (LLAMA_8B, {"num_key_value_heads": 5}, "32 query heads .* 5 key/value heads"),
        (LLAMA_8B, {"num_hidden_layers": 10**9}, "layers"),
        (LLAMA_8B, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        (LLAMA_8B, {"head_dim": 65}, "rotary dimension 65"),
        (LLAMA_8B, {"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        (LLAMA_8B, {"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        (LLAMA_8B, {"rope_scaling": [1]}, "rope_scaling is"),
        (LLAMA_8B, {"layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA_1B, {"sliding_window": 0}, "sliding_window is 0"),
        (GEMMA_1B, {"sliding_window": None}, "sliding_window is missing"),
        (PYTHIA_70M, {"rotary_pct": 0.01}, "rotary dimension 0"),
    ],
)
def test_malformed_in_one_line(base: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFormatError, match=said) as caught:
        resolve_spec(base | change)
    assert "\n" not in str(caught.value)


BASES = [LLAMA_8B, GEMMA_1B, GPT2, FALCON_7B, PYTHIA_70M, QWEN2_05B] + [
    {**LLAMA_8B, "architectures": [family.architectures[0]]} for family in FAMILIES
]
SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["linear", "yarn", "llama3", "default", "full_attention", "sliding_attention"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "partial_rotary_factor", "mscale",
                         "original_max_position_embeddings", "full_attention", "sliding_attention", "beta_fast"]),
        inner, max_size=5),
    max_leaves=6,
)  # fmt: skip
KEYS = st.sampled_from(
    sorted({key for base in BASES for key in base} | {
        "rope_parameters", "layer_types", "head_dim", "sliding_window", "use_sliding_window", "max_window_layers",
        "partial_rotary_factor", "num_kv_heads", "ffn_hidden_size", "n_inner", "attention_bias", "text_config",
        "hidden_act", "num_ln_in_parallel_attn", "multi_query", "parallel_attn", "new_decoder_architecture",
        "query_pre_attn_scalar", "attention_multiplier", "logits_scaling", "sliding_window_pattern"})
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(base=st.sampled_from(BASES), changes=st.dictionaries(KEYS, VALUES, max_size=6), gone=st.sets(KEYS, max_size=2))
def test_any_config_gives_a_sound_spec_or_a_one_line_refusal(
    base: dict[str, Any], changes: dict[str, Any], gone: set[str]
) -> None:
    config = {key: value for key, value in {**base, **changes}.items() if key not in gone}
    refusal: Exception | None = None
    try:
        spec = resolve_spec(config)
    except (ModelFormatError, UnsupportedModelError) as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert len(str(refusal)) < 500
        return
    assert isinstance(spec, ModelSpec)
    assert spec.num_heads % spec.num_kv_heads == 0
    assert len(spec.windows) == spec.num_layers
    assert all(dim > 0 for shape in weight_shapes(spec).values() for dim in shape)
    assert count_parameters(spec).total > 0


@given(
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=8)
)
def test_any_json_is_refused_politely(value: Any) -> None:
    with pytest.raises((ModelFormatError, UnsupportedModelError)):
        resolve_spec(value)


def test_every_family_is_listed() -> None:
    assert len(supported_architectures()) == len(set(supported_architectures())) == 12


def test_specs_need_no_torch() -> None:
    """The planner and the simulator read specs and parameter counts; they must start fast."""
    code = "import sys, foretell.model.families, foretell.model.parameters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
