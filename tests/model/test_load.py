"""The loader: what it refuses, what it leaves alone, how much memory it holds, dummy weights, stages."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretell.config import ModelSpec
from foretell.errors import ConfigError, ModelFormatError
from foretell.inspection import inspect_model
from foretell.kernels import get_kernels
from foretell.model.families import FAMILIES, resolve_spec, tensor_naming
from foretell.model.hf_config import ACTIVATIONS
from foretell.model.load import load_dummy, load_model, resolve_dtype, spec_for
from foretell.model.parameters import count_parameters, weight_shapes
from foretell.model.transformer import Transformer
from foretell.store import ModelFiles, resolve
from tests.model.paged import PagedRunner, greedy, one_thread, prompt_logits

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
PROMPT = [4, 8, 15, 16, 23, 42]
KERNELS = get_kernels("reference")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def write(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random checkpoint of this config under its Hugging Face names."""
    folder.mkdir(exist_ok=True)
    spec = resolve_spec(config)
    torch.manual_seed(1)
    sources = tensor_naming(spec).sources(spec, ())
    state = {source.name: (torch.randn(source.shape) * 0.2).to(dtype) for source in sources.values()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return state


def load(folder: Path) -> Transformer:
    files = resolve(str(folder))
    return load_model(files, spec_for(files), KERNELS, torch.float32)


Change = Callable[[dict[str, Tensor]], Any]
Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(Q1), rf"'{Q1}' \[32, 32\] is missing"),
        (lambda s: s.pop("lm_head.weight"), r"'lm_head.weight' \[50, 32\] is missing"),
        (lambda s: s.update({Q1: torch.zeros(32, 31)}), rf"'{Q1}' has shape \[32, 31\], expected \[32, 32\]"),
        (lambda s: s.update({"model.layers.3.x": torch.zeros(2)}), r"unexpected tensor 'model.layers.3.x' \[2\]"),
        (lambda s: s.update({Q1.replace("weight", "bias"): torch.zeros(32)}), "unexpected tensor .*q_proj.bias"),
        (lambda s: s[Q1].fill_(float("nan")), f"'{Q1}' holds NaN"),
        (lambda s: s["model.norm.weight"][:1].fill_(float("inf")), "'model.norm.weight' holds NaN or infinite"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(1, 32)}), r"norm.weight' has shape \[1, 32\]"),
    ],
)
def test_refused_by_tensor_name(tmp_path: Path, change: Change, said: str) -> None:
    state = write(tmp_path, CONFIG)
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=said) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


TIED = CONFIG | {"tie_word_embeddings": True}


def test_rotary_tables_and_a_tied_head_in_the_file_are_left_alone(tmp_path: Path) -> None:
    state = write(tmp_path, TIED)
    wanted = prompt_logits(load(tmp_path), PROMPT)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(prompt_logits(load(tmp_path), PROMPT), wanted)


def test_a_head_of_its_own_is_used_whatever_the_config_says(tmp_path: Path) -> None:
    """As transformers 5 has it: a head that differs from the embedding cannot be tied to it."""
    state = write(tmp_path, CONFIG)
    wanted = prompt_logits(load(tmp_path), PROMPT)
    (tmp_path / "config.json").write_text(json.dumps(TIED))
    assert torch.equal(prompt_logits(load(tmp_path), PROMPT), wanted)
    counted = inspect_model(resolve(str(tmp_path))).counts
    assert counted.total == sum(tensor.numel() for tensor in state.values())


def test_a_tied_pair_may_be_stored_under_the_heads_name(tmp_path: Path) -> None:
    """safetensors' own save_model keeps the first name of two that share memory."""
    state = write(tmp_path, TIED)
    wanted = prompt_logits(load(tmp_path), PROMPT)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(prompt_logits(load(tmp_path), PROMPT), wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_what_transformers_calls_so(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(KERNELS.activate(x, ACTIVATIONS[name]), ACT2FN[name](x), atol=1e-6, rtol=0)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    state = write(tmp_path, TIED)
    tied = prompt_logits(load(tmp_path), PROMPT)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert torch.equal(prompt_logits(load(tmp_path), PROMPT), tied)


class WatchedSource:
    """A source whose tensors are counted while anyone holds them."""

    format = "safetensors"
    metadata: Mapping[str, Any] = {}

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.alive = self.peak = 0

    def names(self) -> Sequence[str]:
        return list(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.state[name].to(dtype, copy=True)
        size = tensor.numel()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.alive -= size


def test_tensors_are_freed_one_by_one_and_progress_counts_every_parameter(tmp_path: Path) -> None:
    state = write(tmp_path, CONFIG | {"num_hidden_layers": 8})
    source, seen = WatchedSource(state), []
    spec = resolve_spec(CONFIG | {"num_hidden_layers": 8})
    model = load_model(source, spec, KERNELS, torch.float32, progress=lambda *p: seen.append(p))
    total = count_parameters(spec).total
    assert seen[-1] == (total, total) == (sum(t.numel() for t in state.values()),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    embedding, gate_up = 50 * 32, 2 * 40 * 32
    assert source.peak <= embedding + gate_up
    del model
    assert source.alive == 0


def test_pipeline_stages_give_what_the_whole_gives(tmp_path: Path) -> None:
    write(tmp_path, CONFIG | {"tie_word_embeddings": True})
    files = resolve(str(tmp_path))
    spec = spec_for(files)
    whole = load_model(files, spec, KERNELS, torch.float32)
    seen: list[tuple[int, int]] = []
    stages = [
        load_model(files, spec, KERNELS, torch.float32, lambda *p: seen.append(p), layers=layers)
        for layers in (range(1), range(1, 3))
    ]
    assert seen[-1][0] == seen[-1][1]
    assert stages[0].head is None
    assert stages[1].embedding is None
    wanted = prompt_logits(whole, PROMPT)
    runner = PagedRunner(whole, max_tokens=16)
    context = runner.context([len(PROMPT)])
    x = stages[0].embed(torch.tensor(PROMPT), context)
    x = stages[0].run_blocks(x, context, runner.kv[:1])
    x = stages[1].finish(stages[1].run_blocks(x, context, runner.kv[1:]))
    assert torch.equal(stages[1].logits(x), wanted)


def family_specs() -> list[ModelSpec]:
    """One spec of every family, from a config that all of them can read."""
    config = CONFIG | {"n_embd": 32, "n_layer": 3, "n_head": 4, "sliding_window": None, "head_dim": 8}
    config |= {"layer_types": ["full_attention"] * 3}
    return [resolve_spec(config | {"architectures": [family.architectures[0]]}) for family in FAMILIES]


@pytest.mark.parametrize("spec", family_specs(), ids=lambda spec: spec.family)
def test_dummy_weights_make_a_model_of_every_family(spec: ModelSpec) -> None:
    model = load_dummy(spec, KERNELS, torch.float32, seed=3)
    tokens, rows = greedy(model, PROMPT, 4)
    assert rows.isfinite().all()
    assert tokens == greedy(load_dummy(spec, KERNELS, torch.float32, seed=3), PROMPT, 4)[0]
    assert not torch.equal(rows, greedy(load_dummy(spec, KERNELS, torch.float32, seed=4), PROMPT, 4)[1])
    places = [block.attention.o.weight.data_ptr() for block in model.blocks]  # type: ignore[attr-defined]
    assert len(set(places)) == spec.num_layers
    first, second = (block.attention.o.weight for block in model.blocks[:2])  # type: ignore[attr-defined]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("spec", family_specs(), ids=lambda spec: spec.family)
def test_last_rows_alone_are_those_of_all_rows(spec: ModelSpec) -> None:
    model = load_dummy(spec, KERNELS, torch.float32, seed=3)
    parts, tokens = [len(PROMPT), 1, 2], torch.tensor([*PROMPT, 7, 9, 1])
    hidden = []
    for last_rows in (None, torch.tensor([5, 6, 8])):
        runner = PagedRunner(model, max_tokens=16, sequences=3)
        context = runner.context(parts)
        hidden.append(model.forward(tokens, context, runner.kv, last_rows))
        runner.lengths = parts
        hidden.append(runner.step([[3], [4], [5]]))  # on what was kept
    whole, whole_next, last, last_next = hidden
    torch.testing.assert_close(last, whole[[5, 6, 8]])
    torch.testing.assert_close(last_next, whole_next)


def test_every_family_names_every_weight() -> None:
    for spec in family_specs():
        sources = tensor_naming(spec).sources(spec, ())
        assert sources.keys() == weight_shapes(spec).keys()


def test_auto_dtype(tmp_path: Path) -> None:
    write(tmp_path / "f32", CONFIG)
    write(tmp_path / "f16", CONFIG, torch.float16)
    f32, f16 = resolve(str(tmp_path / "f32")), resolve(str(tmp_path / "f16"))
    assert resolve_dtype("auto", f32) == torch.float32
    assert resolve_dtype("auto", f16) == torch.bfloat16
    assert resolve_dtype("auto", replace(f32, size_bytes=300_000_000)) == torch.bfloat16
    assert resolve_dtype("auto", replace(f32, format="none")) == torch.bfloat16
    assert resolve_dtype("float16", f32) == torch.float16
    with pytest.raises(ConfigError, match="int8"):
        resolve_dtype("int8", f32)


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    write(tmp_path, CONFIG)
    files = resolve(str(tmp_path))
    exact = prompt_logits(load(tmp_path), PROMPT)
    rounded = prompt_logits(load_model(files, spec_for(files), KERNELS, torch.bfloat16), PROMPT)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_no_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"no config\.json"):
        spec_for(ModelFiles("x", "x", tmp_path, "none"))


def test_saved_names_match_what_transformers_writes(tmp_path: Path) -> None:
    """``write`` above makes names from our own table; one real save keeps it honest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})).save_pretrained(
        tmp_path
    )
    assert load_file(tmp_path / "model.safetensors").keys() == write(tmp_path / "ours", CONFIG).keys()
