"""Real models on a GPU: the CPU engine's tokens in float32; in bfloat16 as near to float32 as transformers is."""

from __future__ import annotations

import copy
import pydoc_data.topics
from typing import Any

import pytest
import torch

from foretell import LLM, RequestOutput, SamplingParams
from foretell.store import load_tokenizer, resolve
from tests.model import models
from tests.model.test_same_tokens import prompts_for

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
MAX_GAP = 1e-4  # of the two best log-probabilities, below which float32 may choose either
WINDOWS, LENGTH, NEW = 24, 256, 32


@pytest.mark.parametrize("name", models.NAMES)
def test_float32_tokens_are_the_cpu_engines(name: str) -> None:
    path, found = str(models.prepare(name)), []
    wanted = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=2)
    for device in ("cpu", "cuda"):
        with LLM(path, dtype="float32", device=device, kv_cache_bytes=400_000_000, max_num_batched_tokens=512) as llm:
            longest = llm.assembly.max_model_len - NEW
            prompts = [prompt[:longest] for prompt in prompts_for(name, llm)]
            found.append(llm.generate(prompts, wanted, progress=False))
    for cpu, gpu in zip(*found, strict=True):
        for one, other in zip(cpu.outputs[0].logprobs or (), gpu.outputs[0].logprobs or (), strict=True):
            if one.token_id != other.token_id:
                assert one.top[0][1] - one.top[1][1] < MAX_GAP
                break  # what follows has another past
            assert one.logprob == pytest.approx(other.logprob, abs=2e-3)


def windows() -> list[list[int]]:
    """Stretches of Python's documentation, as tokens."""
    topics = pydoc_data.topics.topics
    tokenizer = load_tokenizer(resolve(str(models.prepare("smollm2"))))
    assert tokenizer is not None
    ids = tokenizer.encode("\n\n".join(topics[key] for key in sorted(topics))[: WINDOWS * LENGTH * 6])
    assert len(ids) > WINDOWS * LENGTH
    return [ids[at : at + LENGTH] for at in range(0, WINDOWS * LENGTH, LENGTH)]


def logits_of(oracle: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([ids], device="cuda")).logits[0].float()


def own_logprobs(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of every token but the first, [len(ids) - 1]."""
    following = torch.tensor(ids[1:], device=logits.device)[:, None]
    return torch.log_softmax(logits[:-1].double(), -1).gather(1, following)[:, 0].cpu()


def told(output: RequestOutput) -> torch.Tensor:
    """Log-probabilities of the prompt's tokens from the second on, then of the generated ones."""
    assert output.prompt_logprobs is not None
    prompt = [one.logprob for one in output.prompt_logprobs if one is not None]
    return torch.tensor(prompt + [one.logprob for one in output.outputs[0].logprobs or ()], dtype=torch.float64)


def test_bfloat16_is_as_near_to_float32_as_transformers_is() -> None:
    texts = windows()
    wanted = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    with LLM(str(models.prepare("smollm2")), dtype="bfloat16", device="cuda", kv_cache_bytes=1 << 30) as llm:
        outputs = llm.generate(texts, wanted, progress=False)
    oracle = copy.deepcopy(models.oracle("smollm2")).to("cuda")
    sequences = [text + list(output.outputs[0].token_ids) for text, output in zip(texts, outputs, strict=True)]
    exact = [logits_of(oracle, ids) for ids in sequences]
    for weight in oracle.parameters():  # not the rotary tables, which transformers keeps in float32
        weight.data = weight.data.bfloat16()
    theirs = [logits_of(oracle, ids) for ids in sequences]
    pairs = [(own_logprobs(e, ids), own_logprobs(t, ids)) for e, t, ids in zip(exact, theirs, sequences, strict=True)]
    reference = torch.cat([e for e, _ in pairs])
    rivals = (torch.cat([t for _, t in pairs]) - reference).abs()
    ours = (torch.cat([told(output) for output in outputs]) - reference).abs()
    flips = [
        float(e[at].max() - e[at][t[at].argmax()])
        for e, t in zip(exact, theirs, strict=True)
        for at in (e.argmax(-1) != t.argmax(-1)).nonzero()[:, 0].tolist()
    ]
    print(f"|Δ logprob| mean {ours.mean():.5f} (transformers {rivals.mean():.5f}), "
          f"p99 {ours.quantile(0.99):.4f} ({rivals.quantile(0.99):.4f}), flips up to {max(flips):.4f}")  # fmt: skip
    assert ours.mean() <= 1.2 * rivals.mean()
    assert ours.quantile(0.99) <= 1.2 * rivals.quantile(0.99)
    for e, output in zip(exact, outputs, strict=True):
        first = output.outputs[0].token_ids[0]
        assert float(e[LENGTH - 1].max() - e[LENGTH - 1][first]) <= max(flips)
