"""The families once more through GGUF files, written here as llama.cpp's converter writes them.

Names come from the gguf package's own table, changes of layout are written out below, so that the adapter
is checked against something it did not make itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.errors import ModelFormatError, UnsupportedModelError
from foretell.kernels import get_kernels
from foretell.model.gguf_adapter import gguf_config
from foretell.model.load import load_model, spec_for
from foretell.model.parameters import count_parameters
from foretell.store import open_tensors, resolve
from tests.model.models import hf_greedy
from tests.model.paged import greedy, one_thread, prompt_logits
from tests.model.test_families import CASES, PROMPT, TOLERANCE, Case, _case, _neox, make

BY_NAME = {case.name: case for case in CASES}
STEPS = 12

# case → general.architecture
FILES: list[tuple[Case, str]] = [
    (BY_NAME["llama"], "llama"),
    (BY_NAME["llama-mqa-tied"], "llama"),
    (BY_NAME["llama-biases-head-dim"], "llama"),
    (BY_NAME["llama-llama3"], "llama"),
    (BY_NAME["llama-linear"], "llama"),
    (BY_NAME["llama-yarn"], "llama"),
    (BY_NAME["mistral-full"], "llama"),
    (BY_NAME["qwen2"], "qwen2"),
    (BY_NAME["qwen3"], "qwen3"),
    (BY_NAME["gemma3"], "gemma3"),
    (BY_NAME["gemma3-linear"], "gemma3"),
    (BY_NAME["gpt2"], "gpt2"),
    (BY_NAME["gpt-neox"], "gptneox"),
    (_neox("gpt-neox-sequential-gelu", use_parallel_residual=False), "gptneox"),
    (BY_NAME["phi3"], "phi3"),
    (BY_NAME["phi3-partial-window"], "phi3"),
    (BY_NAME["granite"], "granite"),
    (BY_NAME["olmo2"], "olmo2"),
    (_case("starcoder2-full", "Starcoder2"), "starcoder2"),
    (BY_NAME["starcoder2-no-bias"], "starcoder2"),
    (BY_NAME["falcon-7b"], "falcon"),
    (BY_NAME["falcon-40b"], "falcon"),
    (BY_NAME["falcon-11b"], "falcon"),
]


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The converter's row order for q and k of llama and granite: each head's halves become neighbours."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def ungroup(fused: Tensor, groups: int, queries: int, dim: int) -> Tensor:
    """Per-group q…q k v (falcon, gpt-neox) → all q, all k, all v."""
    parts = fused.reshape(groups, queries + 2, dim, *fused.shape[1:])
    q, k, v = parts[:, :queries], parts[:, queries], parts[:, queries + 1]
    return torch.cat(
        [q.reshape(-1, *fused.shape[1:]), k.reshape(-1, *fused.shape[1:]), v.reshape(-1, *fused.shape[1:])]
    )


def converted(name: str, tensor: Tensor, architecture: str, config: Any) -> Tensor:
    heads = config.num_attention_heads
    if architecture in ("llama", "granite"):
        if ".q_proj." in name:
            return interleave(tensor, heads)
        if ".k_proj." in name:
            return interleave(tensor, config.num_key_value_heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
        return tensor.t()
    if "query_key_value" in name:
        dim = config.hidden_size // heads
        if architecture == "gptneox":
            return ungroup(tensor, heads, 1, dim)
        groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        return ungroup(tensor, groups, heads // groups, dim)
    return tensor


def write_gguf(path: Path, model: Any, architecture: str, **changes: Any) -> None:
    """``changes``: metadata to put on top; None takes a key away."""
    import gguf

    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata(model, architecture) | changes).items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name in ("lm_head.weight", "embed_out.weight"):
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, converted(name, tensor, architecture, config).contiguous().float().numpy())
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        table = model.model.rotary_emb
        dim = 2 * len(table.inv_freq)
        plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim)
        writer.add_tensor("rope_freqs.weight", (plain / table.inv_freq.double()).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(model: Any, architecture: str) -> dict[str, Any]:
    config = model.config
    heads = config.num_attention_heads
    ffn = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(architecture, "intermediate_size")
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, ffn) or 4 * config.hidden_size,
        "attention.head_count": heads,
    }
    if architecture == "falcon":
        fields["attention.head_count_kv"] = config.num_kv_heads if config.new_decoder_architecture else 1
    elif architecture != "gpt2":
        fields["attention.head_count_kv"] = getattr(config, "num_key_value_heads", heads)
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, key):
            rms = "rms_" if key == "rms_norm_eps" else ""
            fields[f"attention.layer_norm_{rms}epsilon"] = float(getattr(config, key))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim != config.hidden_size // heads:
        fields |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    fields |= _rope(config, head_dim, architecture)
    if architecture in ("gemma3", "phi3"):
        fields["attention.sliding_window"] = config.sliding_window or 0
    if architecture == "gptneox":
        fields["use_parallel_residual"] = config.use_parallel_residual
    if architecture == "granite":
        fields |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    return fields


def _rope(config: Any, head_dim: int, architecture: str) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    rope = rope.get("full_attention", rope)
    fields: dict[str, Any] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return fields


def extras(case: Case) -> dict[str, Any]:
    """What the converter writes for variants that its defaults do not cover."""
    if case.name == "gemma3-linear":
        return {"attention.sliding_window_pattern": [True, False] * 2, "rope.freq_base_swa": 500.0}
    return {}


def gemma_at_its_defaults(case: Case) -> Case:
    """GGUF has no query scale: files exist only of models where it is 1/√head_dim."""
    if not case.name.startswith("gemma3"):
        return case
    return Case(
        case.name, case.model, case.config, {**case.options, "query_pre_attn_scalar": case.options["head_dim"]}
    )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(("case", "architecture"), FILES, ids=[f"{a}-{c.name}" for c, a in FILES])
def test_gguf_equals_transformers(case: Case, architecture: str, tmp_path: Path) -> None:
    oracle = make(gemma_at_its_defaults(case), tmp_path / "hf")
    path = tmp_path / "model.gguf"
    write_gguf(path, oracle, architecture, **extras(case))
    files = resolve(str(path))
    spec = spec_for(files)
    assert count_parameters(spec).total == sum(p.numel() for p in oracle.parameters())
    model = load_model(files, spec, get_kernels("reference"), torch.float32)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([PROMPT])).logits[0]
        assert (prompt_logits(model, PROMPT) - wanted).abs().max() < TOLERANCE
        tokens, _ = greedy(model, PROMPT, STEPS)
        assert tokens == hf_greedy(oracle, PROMPT, STEPS)[0]


@pytest.fixture
def llama_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "changed.gguf"
        write_gguf(path, make(BY_NAME["llama"], tmp_path / "hf"), "llama", **changes)
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, UnsupportedModelError, "longrope"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, UnsupportedModelError, "yarn_log_multiplier"),
        ({"expert_count": 8}, UnsupportedModelError, "num_local_experts"),
        ({"final_logit_softcapping": 30.0}, UnsupportedModelError, "final_logit_softcapping"),
        ({"attention.head_count_kv": [2, 2, 1]}, ModelFormatError, "head_count_kv"),
        ({"attention.head_count": 0}, ModelFormatError, "head_count"),
        ({"attention.key_length": 8, "attention.value_length": 4}, UnsupportedModelError, "value_length"),
        ({"embedding_length": None}, ModelFormatError, "embedding_length"),
        ({"block_count": 4}, ModelFormatError, "blk.3."),
        ({"feed_forward_length": 51}, ModelFormatError, "ffn_gate"),
        ({"rope.dimension_count": 6}, UnsupportedModelError, "partial_rotary_factor"),
    ],
)
def test_gguf_refusals(llama_file: Callable[..., Path], changes: dict[str, Any], error: type, said: str) -> None:
    files = resolve(str(llama_file(**changes)))
    with pytest.raises(error, match=said) as caught:
        load_model(files, spec_for(files), get_kernels("reference"), torch.float32)
    assert "\n" not in str(caught.value)


def test_unknown_gguf_architecture(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("token_embd.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, qwen2"):
        gguf_config(open_tensors(resolve(str(tmp_path / "x.gguf"))))
