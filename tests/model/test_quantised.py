"""A quantised GGUF kept as shipped gives the float32 model's numbers, bit by bit: its weights are the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.kernels import get_kernels
from foretell.kernels.cpu_quant import CpuQuantLinear
from foretell.model.load import load_model, spec_for
from foretell.model.parameters import count_parameters
from foretell.model.transformer import Transformer
from foretell.store import resolve
from foretell.store.gguf_rows import QuantisedRows
from tests.model import models
from tests.model.paged import greedy, one_thread, prompt_logits
from tests.model.test_same_tokens import TEXTS

MODELS = ["smollm2", "gemma3-270m"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


@cache
def loaded(name: str, dtype: torch.dtype, keep: bool, backend: str = "cpu") -> Transformer:
    files = resolve(str(models.prepare(name)))
    seen: list[tuple[int, int]] = []
    model = load_model(
        files, spec_for(files), get_kernels(backend), dtype, lambda *p: seen.append(p), keep_quantised=keep
    )
    parameters = count_parameters(model.spec).total
    assert seen[-1] == (parameters, parameters)
    return model


@pytest.mark.parametrize("name", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_logits_are_those_of_the_float32_weights(name: str) -> None:
    packed, wide = loaded(name, torch.bfloat16, True), loaded(name, torch.float32, False)
    prompt = list(models.info(name).prompt) * 3
    for chunk in (1, 7, len(prompt)):
        assert torch.equal(prompt_logits(packed, prompt, chunk=chunk), prompt_logits(wide, prompt, chunk=chunk))
    assert greedy(packed, prompt, 24)[0] == greedy(wide, prompt, 24)[0]


def test_what_is_kept_and_what_it_weighs() -> None:
    packed = loaded("smollm2", torch.bfloat16, True)
    assert packed.head is not None
    assert packed.embedding is not None
    assert isinstance(packed.head.linear, CpuQuantLinear)
    assert isinstance(packed.embedding.tokens, QuantisedRows)
    assert isinstance(packed.blocks[0].attention.qkv, CpuQuantLinear)
    head, layers = 49152 * 576, 30 * 576 * (960 + 576 + 3 * 1536)
    assert packed.weight_bytes == layers * 20 // 32 + 2 * head * 34 // 32
    assert loaded("smollm2", torch.bfloat16, False).weight_bytes == 2 * (layers + 2 * head)


def test_the_reference_kernels_dequantise() -> None:
    kept, plain = (loaded("smollm2", torch.bfloat16, keep, "reference") for keep in (True, False))
    prompt = list(models.info("smollm2").prompt)
    assert torch.equal(prompt_logits(kept, prompt, chunk=64), prompt_logits(plain, prompt, chunk=64))


def test_the_engine_writes_what_it_writes_in_float32() -> None:
    """Apart from the KV cache, which has bfloat16 numbers: tokens may differ at near-ties, seldom and late."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    tokens = []
    for dtype in ("auto", "float32"):
        with LLM(str(models.prepare("smollm2")), dtype=dtype, max_num_batched_tokens=256) as llm:
            outputs = llm.generate(TEXTS, params)
            tokens.append([o.outputs[0].token_ids for o in outputs])
    same = sum(a == b for a, b in zip(*tokens, strict=True))
    assert same >= len(TEXTS) - 3
    assert all(a[0] == b[0] for a, b in zip(*tokens, strict=True))
