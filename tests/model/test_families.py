"""Every family against transformers in float32: tiny random checkpoints, all options that are implemented."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell.kernels import get_kernels
from foretell.model.load import load_model, spec_for
from foretell.model.parameters import count_parameters
from foretell.store import resolve
from tests.model.models import hf_greedy
from tests.model.paged import PagedRunner, greedy, one_thread, prompt_logits

PROMPT = [3, 41, 8, 8, 65, 12, 30, 2, 57, 19, 44, 60, 5, 33, 21, 9, 50, 27, 14, 1, 63, 38, 17]
STEPS = 32
TOLERANCE = 1e-4  # of logits that reach about ±10

SMALL = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


@dataclass(frozen=True)
class Case:
    """A transformers model class, its config class, and the options that differ from SMALL."""

    name: str
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)


def _case(name: str, stem: str, **options: Any) -> Case:
    return Case(name, f"{stem}ForCausalLM", f"{stem}Config", {**SMALL, **options})


def _gpt2(name: str, model: str = "GPT2LMHeadModel", **options: Any) -> Case:
    sizes = {"vocab_size": 67, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
    return Case(name, model, "GPT2Config", {**sizes, **options})


def _neox(name: str, **options: Any) -> Case:
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    return Case(name, "GPTNeoXForCausalLM", "GPTNeoXConfig", {**sizes, **options})


def _falcon(name: str, **options: Any) -> Case:
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    return Case(name, "FalconForCausalLM", "FalconConfig", {**sizes, "ffn_hidden_size": 50, **options})


def _gemma(name: str, **options: Any) -> Case:
    return Case(name, "Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, "num_key_value_heads": 1, **options})


CASES = [
    _case("llama", "Llama"),
    _case("llama-mha", "Llama", num_key_value_heads=6),
    _case("llama-mqa-tied", "Llama", num_key_value_heads=1, tie_word_embeddings=True),
    _case("llama-biases-head-dim", "Llama", head_dim=10, attention_bias=True, mlp_bias=True),
    _case("llama-llama3", "Llama", rope_parameters=LLAMA3),
    _case("llama-linear", "Llama", rope_parameters=LINEAR),
    _case("llama-yarn", "Llama", head_dim=32, rope_parameters=YARN),
    _case("llama-yarn-options", "Llama", head_dim=32, rope_parameters={
        **YARN, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}),
    _case("mistral-window", "Mistral", sliding_window=5, head_dim=12),
    _case("mistral-full", "Mistral", sliding_window=None),
    _case("qwen2", "Qwen2"),
    _case("qwen2-window", "Qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1,
          tie_word_embeddings=True),
    _case("qwen3", "Qwen3", head_dim=16, tie_word_embeddings=True),
    _case("qwen3-bias-yarn-window", "Qwen3", head_dim=16, attention_bias=True, rope_parameters=YARN,
          use_sliding_window=True, sliding_window=4, max_window_layers=2),
    _gemma("gemma3", num_hidden_layers=7, head_dim=16, query_pre_attn_scalar=24, sliding_window=5),
    _gemma("gemma3-linear", num_hidden_layers=4, head_dim=8, sliding_window=3, num_key_value_heads=2,
           attention_bias=True, layer_types=["sliding_attention", "full_attention"] * 2,
           rope_parameters={"full_attention": LINEAR, "sliding_attention": {"rope_type": "default",
                                                                           "rope_theta": 500.0}}),
    _gpt2("gpt2"),
    _gpt2("gpt2-untied-relu", tie_word_embeddings=False, activation_function="relu", n_inner=70),
    _gpt2("gpt2-unscaled", scale_attn_weights=False),
    _neox("gpt-neox", rope_parameters={"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}),
    _neox("gpt-neox-sequential", use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
          rope_parameters={**LINEAR, "partial_rotary_factor": 1.0}),
    _case("phi3", "Phi3", pad_token_id=0),
    _case("phi3-partial-window", "Phi3", pad_token_id=0, sliding_window=5, num_attention_heads=3,
          num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 100.0,
                                                  "partial_rotary_factor": 0.25}),
    _case("granite", "Granite", attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.4,
          logits_scaling=2.0, attention_bias=True, mlp_bias=True),
    _case("olmo2", "Olmo2"),
    _case("olmo2-bias", "Olmo2", attention_bias=True, num_key_value_heads=3),
    _case("starcoder2", "Starcoder2", sliding_window=5),
    _case("starcoder2-no-bias", "Starcoder2", use_bias=False, tie_word_embeddings=False),
    _falcon("falcon-7b"),
    _falcon("falcon-40b", new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    _falcon("falcon-11b", new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1, bias=True),
    _falcon("falcon-mha-sequential", multi_query=False, parallel_attn=False, bias=True),
    _falcon("falcon-mha-parallel", multi_query=False),
]  # fmt: skip


def make(case: Case, folder: Path) -> Any:
    """A random transformers model of this case, saved to the folder. No weight keeps a special value."""
    import transformers

    config = getattr(transformers, case.config)(**case.options)
    torch.manual_seed(len(case.name))
    model = getattr(transformers, case.model)(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 / parameter.shape[-1] ** 0.5)
            else:
                centre = 1.0 if "weight" in name and "gemma" not in case.name else 0.0
                parameter.normal_(mean=centre, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Any:
    backend = get_kernels("auto") if request.param == "cpu" else get_kernels("reference")
    if backend.name != request.param:
        pytest.skip("the C++ kernels cannot be built here")
    return backend


@dataclass(frozen=True)
class Made:
    """A checkpoint and what transformers makes of it."""

    folder: Path
    parameters: int
    prompt_logits: torch.Tensor
    greedy_tokens: list[int]
    greedy_logits: torch.Tensor


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Made]:
    """Makes each case once, for both backends."""

    @cache
    @torch.inference_mode()
    def of(case_name: str) -> Made:
        case = next(case for case in CASES if case.name == case_name)
        folder = tmp_path_factory.mktemp(case.name)
        oracle = make(case, folder)
        tokens, rows = hf_greedy(oracle, PROMPT, STEPS)
        logits = oracle(torch.tensor([PROMPT])).logits[0]
        return Made(folder, sum(p.numel() for p in oracle.parameters()), logits, tokens, rows)

    return lambda case: of(case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_family_equals_transformers(case: Case, kernels: Any, made: Callable[[Case], Made]) -> None:
    wanted = made(case)
    files = resolve(str(wanted.folder))
    spec = spec_for(files)
    assert count_parameters(spec).total == wanted.parameters
    model = load_model(files, spec, kernels, torch.float32)
    with torch.inference_mode():
        for chunk in (0, 5):
            assert (prompt_logits(model, PROMPT, chunk=chunk) - wanted.prompt_logits).abs().max() < TOLERANCE
        tokens, rows = greedy(model, PROMPT, STEPS)
    assert tokens == wanted.greedy_tokens
    assert (rows - wanted.greedy_logits).abs().max() < TOLERANCE
    assert wanted.prompt_logits.abs().max() > 0.5, "logits too flat to tell models apart"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_sequences_in_one_batch_do_not_touch(name: str, kernels: Any, made: Callable[[Case], Made]) -> None:
    """Prefill of one sequence, decode of another and a third that waits, in shared steps."""
    wanted = made(next(case for case in CASES if case.name == name))
    files = resolve(str(wanted.folder))
    model = load_model(files, spec_for(files), kernels, torch.float32)
    other = PROMPT[::-1]
    with torch.inference_mode():
        alone = prompt_logits(model, other)
        runner = PagedRunner(model, max_tokens=64, sequences=3)
        runner.step([PROMPT[:-1], [], other[:4]])
        mixed = runner.step([PROMPT[-1:], [7, 7], other[4:11]])
        last = runner.step([wanted.greedy_tokens[:1], [], other[11:]])
    assert (mixed[0] - wanted.prompt_logits[-1]).abs().max() < TOLERANCE
    assert (mixed[3:] - alone[4:11]).abs().max() < TOLERANCE
    assert (last[0] - wanted.greedy_logits[1]).abs().max() < TOLERANCE
    assert (last[1:] - alone[11:]).abs().max() < TOLERANCE


def test_bare_gpt2_names(made: Callable[[Case], Made], tmp_path: Path, kernels: Any) -> None:
    """GPT2Model checkpoints call the weights without the transformer. prefix."""
    from safetensors.torch import load_file, save_file

    wanted = made(next(case for case in CASES if case.name == "gpt2"))
    state = load_file(wanted.folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    assert "wte.weight" in bare
    save_file(bare, tmp_path / "model.safetensors")
    config = json.loads((wanted.folder / "config.json").read_text()) | {"architectures": ["GPT2Model"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = resolve(str(tmp_path))
    model = load_model(files, spec_for(files), kernels, torch.float32)
    with torch.inference_mode():
        assert (prompt_logits(model, PROMPT) - wanted.prompt_logits).abs().max() < TOLERANCE


def test_gemma3_text_half_of_a_multimodal_checkpoint(
    made: Callable[[Case], Made], tmp_path: Path, kernels: Any
) -> None:
    from safetensors.torch import load_file, save_file

    wanted = made(next(case for case in CASES if case.name == "gemma3"))
    state = load_file(wanted.folder / "model.safetensors")
    text = json.loads((wanted.folder / "config.json").read_text())
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        renamed = {prefix + name.removeprefix("model."): t for name, t in state.items() if name != "lm_head.weight"}
        renamed["vision_tower.patch.weight"] = torch.zeros(2)
        save_file(renamed, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        files = resolve(str(folder))
        model = load_model(files, spec_for(files), kernels, torch.float32)
        with torch.inference_mode():
            assert (prompt_logits(model, PROMPT) - wanted.prompt_logits).abs().max() < TOLERANCE
