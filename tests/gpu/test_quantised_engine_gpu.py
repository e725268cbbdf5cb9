"""The engine with weights and cache in fewer bits: the tokens of transformers with what the codes mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.kernels.formats import FORMATS
from tests.gpu.test_engine_gpu import options, oracle_gaps, prompts, write_random_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama-gqa-64", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, write_random_model(request.param, path)


def gaps_of(path: Path, oracle: Any, **changed: Any) -> tuple[list[float], int]:
    """oracle_gaps at every token of some prompts, and the bytes of the weights."""
    with LLM(str(path), **options(**changed)) as llm:
        outputs = llm.generate(prompts(24), GREEDY, progress=False)
        weight_bytes = llm.assembly.weight_bytes
        assert llm.assembly.weight_format == changed.get("quantization", "bfloat16")
    found = []
    for prompt, output in zip(prompts(24), outputs, strict=True):
        assert output.outputs[0].error is None
        found += oracle_gaps(oracle, prompt, list(output.outputs[0].token_ids))
    return found, weight_bytes


def round_weights(oracle: Any, name: str, dtype: torch.dtype) -> None:
    """To what the codes of weights of this dtype mean."""
    for key, weight in oracle.model.named_parameters():
        if key.startswith("layers.") and weight.dim() == 2:
            codes = FORMATS[name].quantise(weight.data.to(dtype))
            weight.data.copy_(FORMATS[name].dequantise(codes, weight.shape[1]))


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_what_the_codes_mean(model: tuple[Path, Any], name: str, tmp_path: Path) -> None:
    path, oracle = model
    kept = {key: value.clone() for key, value in oracle.state_dict().items()}
    try:
        round_weights(oracle, name, torch.float32)
        exact, _ = gaps_of(path, oracle, quantization=name)
        assert max(exact) < 2e-3  # float32: expanded weights
        oracle.load_state_dict(kept)
        round_weights(oracle, name, torch.bfloat16)
        rounded, weight_bytes = gaps_of(path, oracle, quantization=name, dtype="bfloat16")
        assert sum(rounded) / len(rounded) < (0.1 if name == "fp8" else 0.02)  # codes, many rows rounded for fp8
        assert max(rounded) < (2.0 if name == "fp8" else 0.6)
        parameters = sum(weight.numel() for weight in oracle.parameters())
        assert weight_bytes < 2 * parameters
    finally:
        oracle.load_state_dict(kept)


def test_a_cache_of_8_bits_holds_twice_the_tokens(model: tuple[Path, Any]) -> None:
    path, oracle = model
    gaps, _ = gaps_of(path, oracle, dtype="bfloat16", kv_cache_dtype="fp8")
    assert sum(gaps) / len(gaps) < 0.1
    found = []
    for kind in ("auto", "fp8"):
        few = options(dtype="bfloat16", kv_cache_dtype=kind, kv_cache_bytes=4 << 20)
        with LLM(str(path), **few) as llm:
            found.append(llm.assembly.kv_tokens)
            assert llm.assembly.ledger is not None
            assert llm.assembly.ledger.entries["KV cache"] < 5 << 20
    assert found[1] >= 1.9 * found[0]
