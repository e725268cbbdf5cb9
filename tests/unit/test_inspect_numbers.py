"""The numbers of `inspect` against formulas written out a second time, in float64 or by brute force."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.config import ModelSpec
from foretell.cost import operations as ops
from foretell.cost.floor import ChunkShape, FloorCost
from foretell.cost.hardware import Hardware
from foretell.errors import ConfigError
from foretell.inspection import as_dict, inspect_model
from foretell.inspection.examine import context_lengths
from foretell.model.families import resolve_spec
from foretell.store import resolve

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 128256,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 49152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA_270M: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 512, "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
}  # fmt: skip


def folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def inspected(tmp_path: Path, config: dict[str, Any], dtype: str = "auto") -> dict[str, Any]:
    return as_dict(inspect_model(resolve(str(folder(tmp_path, config))), dtype))


@pytest.mark.parametrize(
    ("config", "total", "kind"),
    [(LLAMA_8B, 8_030_261_248, "GQA"), (SMOLLM2, 134_515_008, "GQA"), (GEMMA_270M, 268_098_176, "MQA")],
)
def test_parameter_counts_and_their_parts(tmp_path: Path, config: dict[str, Any], total: int, kind: str) -> None:
    seen = inspected(tmp_path, config)
    parameters = seen["parameters"]
    assert parameters["total"] == total
    assert seen["attention"]["kind"] == kind
    assert parameters["per_layer"] == sum(parameters["layer"].values())
    parts = ("embedding", "positions", "all_layers", "final_norm", "head")
    assert sum(parameters[part] for part in parts) == total
    assert seen["weights_bytes"] == {"float32": 4 * total, "bfloat16": 2 * total, "float16": 2 * total}
    assert abs(parameters["estimate"]["total"] / total - 1) < 0.001


def test_llama_8b_by_hand(tmp_path: Path) -> None:
    seen = inspected(tmp_path, LLAMA_8B)
    h, ffn, layers, heads, groups, width, vocab = 4096.0, 14336.0, 32.0, 32.0, 8.0, 128.0, 128256.0
    assert seen["dtype"] == "bfloat16"
    assert seen["kv_cache"]["bytes_per_token"] == 2 * layers * groups * width * 2 == 131072
    assert seen["kv_cache"]["bytes_per_token_if_mha"] == 4 * 131072
    projections = 2 * layers * (h * heads * width * 2 + h * groups * width * 2)
    for row in seen["per_token"]:
        n = float(row["context_tokens"])
        assert row["attention_scores_flops"] == layers * heads * (2 * n * width + 2 * n * width)
        assert row["attention_projections_flops"] == projections
        assert row["mlp_flops"] == 2 * layers * 3 * h * ffn
        assert row["head_flops"] == 2 * h * vocab
        assert row["kv_read_bytes"] == row["kv_cache_bytes"] == 131072 * n
        assert row["kv_written_bytes"] == 131072
        weights = 8_030_261_248 - vocab * h  # of the embedding only one row is read
        assert row["total_bytes"] == 2 * (weights + h) + 131072 * (n + 1)
    assert seen["attention_exceeds_mlp_from_tokens"] == 3 * 2 * h * ffn / (4 * heads * width) == 21504
    memory = {(row["context_tokens"], row["batch_size"]): row["total_bytes"] for row in seen["memory"]}
    assert memory[131072, 8] == 2 * 8_030_261_248 + 8 * 131072 * 131072


def test_kv_of_sliding_layers_stops_growing_at_the_window() -> None:
    spec = resolve_spec(GEMMA_270M)
    per_layer = 2 * 256 * 2
    for tokens in (1, 511, 512, 513, 32768):
        assert ops.kv_bytes(spec, tokens, 2) == per_layer * (3 * tokens + 15 * min(tokens, 512))
    flat = [ops.score_flops(spec, ops.visible_keys(n, 512)) for n in (512, 1024, 32768)]
    assert len(set(flat)) == 1


@given(tokens=st.integers(0, 60), window=st.one_of(st.none(), st.integers(1, 70)))
def test_visible_pairs_are_counted(tokens: int, window: int | None) -> None:
    pairs = [(q, k) for q in range(tokens) for k in range(q + 1) if window is None or q - k < window]
    assert ops.visible_pairs(tokens, window) == len(pairs)
    assert tokens == 0 or ops.visible_keys(tokens, window) == sum(q == tokens - 1 for q, _ in pairs)


@pytest.mark.parametrize("config", [LLAMA_8B, SMOLLM2, GEMMA_270M])
@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_a_prefill_is_its_tokens_one_by_one(config: dict[str, Any], tokens: int) -> None:
    spec = resolve_spec(config)
    whole, single = ops.prefill_flops(spec, tokens), [ops.decode_flops(spec, n + 1) for n in range(tokens)]
    assert whole.attention == sum(one.attention for one in single)
    assert whole.mlp == sum(one.mlp for one in single)
    assert whole.head == single[-1].head
    assert whole.total == whole.attention + whole.mlp + whole.head


@pytest.mark.parametrize("config", [LLAMA_8B, SMOLLM2, GEMMA_270M])
@pytest.mark.parametrize("tokens", [1, 100, 4096])
def test_agrees_with_the_cost_floor(config: dict[str, Any], tokens: int) -> None:
    """The floor of a step, written by another hand, counts the same operations."""
    spec = resolve_spec(config)
    floor = FloorCost(spec, Hardware(1, 1e9, {"float32": 1e9}), "bfloat16")
    assert floor.work([ChunkShape(tokens - 1, 1)]).flops == ops.decode_flops(spec, tokens).total
    assert floor.work([ChunkShape(0, tokens)]).flops == ops.prefill_flops(spec, tokens).total


def test_crossover_is_the_first_context_where_attending_costs_as_much_as_the_mlp() -> None:
    for config in (LLAMA_8B, SMOLLM2, GEMMA_270M):
        spec = resolve_spec(config)
        at = ops.crossover_tokens(spec)
        assert at is not None
        assert ops.decode_flops(spec, at).attention_scores >= ops.decode_flops(spec, at).mlp
        assert ops.decode_flops(spec, at - 1).attention_scores < ops.decode_flops(spec, at).mlp
    assert ops.crossover_tokens(all_sliding(spec)) is None


def all_sliding(spec: ModelSpec) -> ModelSpec:
    from dataclasses import replace

    return replace(spec, windows=(512,) * spec.num_layers)


@pytest.mark.parametrize("longest", [1, 2, 7, 128, 512, 1000, 1024, 4096, 8192, 32768, 131072, 1 << 20])
def test_contexts_rise_to_the_longest(longest: int) -> None:
    lengths = context_lengths(longest)
    assert lengths[-1] == longest
    assert lengths == sorted(set(lengths))
    assert 1 <= len(lengths) <= 7


def test_intensity_says_what_limits_each_phase(tmp_path: Path) -> None:
    intensity = inspected(tmp_path, LLAMA_8B)["intensity"]
    assert "compute-bound" in intensity["prefill_in_words"]
    assert "memory-bound" in intensity["decode_in_words"]
    assert intensity["decode"]["flops_per_byte"] < 2 < 20 < intensity["decode_batched"]["flops_per_byte"]
    assert intensity["prefill"]["flops"] / intensity["prefill"]["bytes"] == intensity["prefill"]["flops_per_byte"]


def test_dtype_scales_memory_and_nonsense_is_refused(tmp_path: Path) -> None:
    wide = inspected(tmp_path, SMOLLM2, "float32")
    assert (wide["bytes_per_element"], wide["kv_cache"]["bytes_per_token"]) == (4, 46080)
    with pytest.raises(ConfigError, match="int3"):
        inspected(tmp_path, SMOLLM2, "int3")


def test_inspecting_a_config_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['foretell', 'inspect', sys.argv[1], '--json']\nfrom foretell.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(folder(tmp_path, LLAMA_8B))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"]["total"] == 8_030_261_248
