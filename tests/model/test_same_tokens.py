"""The engine against transformers in float32: same greedy tokens, same log-probabilities.

Each output is checked by one forward pass of the oracle over prompt + output: if every token is the oracle's
argmax given the tokens before it, then the oracle's own greedy decoding gives exactly these tokens.
"""

from __future__ import annotations

import random

import pytest
import torch

from foretell import LLM, SamplingParams
from tests.model import models

TOKENS = 64
MAX_GAP = 1e-4  # a token may differ only where the oracle's two best logits are closer than this

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a land far away, there lived",
    "1, 1, 2, 3, 5, 8, 13,",
    "Die Würde des Menschen ist",
    "机器学习是",
    "Q: Why is the sky blue?\nA:",
    "🙂 emoji and    spaces\t\n\n mixed",
]


def prompts_for(name: str, llm: LLM) -> list[list[int]]:
    """Eight or more fixed prompts; for Gemma one longer than its window of 512 tokens."""
    info = models.info(name)
    rng = random.Random(7)
    if llm.tokenizer is not None:
        prompts = [llm.tokenizer.encode(text) for text in TEXTS]
        long = llm.tokenizer.encode(" ".join(f"Item {i} costs {i * 7 % 13} coins." for i in range(75)))
        assert len(long) > 600
        return [*prompts, long[:700]]
    longest = min(300, info.max_length - TOKENS - 1)
    lengths = [1, 2, 3, 17, 31, 32, 33, longest]
    return [list(info.prompt), *([rng.randrange(info.vocab_size) for _ in range(n)] for n in lengths)]


@torch.inference_mode()
def check_against_oracle(name: str, prompt: list[int], tokens: list[int], logprobs: list[float]) -> int:
    """Number of tokens that differ from the oracle's argmax (each only within MAX_GAP)."""
    logits = models.oracle_logits(name, prompt + tokens)[len(prompt) - 1 : -1]
    reference = torch.log_softmax(logits.double(), -1)
    own = reference.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (own - torch.tensor(logprobs, dtype=torch.float64)).abs().max() < 1e-3
    different = 0
    for row, token in zip(logits, tokens, strict=True):
        if int(row.argmax()) != token:
            assert float(row.max() - row[token]) < MAX_GAP, "diverged where the oracle is sure"
            different += 1
    return different


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m", "microformer", "glassllm", "smollm2-mha"])
def test_greedy_tokens_and_logprobs_equal_transformers_float32(name: str) -> None:
    with LLM(str(models.prepare(name)), dtype="float32", max_num_batched_tokens=256) as llm:
        prompts = prompts_for(name, llm)
        assert len(prompts) >= 8
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
        outputs = llm.generate(prompts, params)
        different = 0
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            assert len(completion.token_ids) == TOKENS
            assert completion.logprobs is not None
            logprobs = [item.logprob for item in completion.logprobs]
            different += check_against_oracle(name, prompt, completion.token_ids, logprobs)
        assert different == 0, f"{different} tokens at near-ties differ on the fixed prompts"


def test_prompt_logprobs_equal_transformers_float32() -> None:
    with LLM(str(models.prepare("glassllm")), dtype="float32", max_num_batched_tokens=16) as llm:
        prompt = [random.Random(3).randrange(1024) for _ in range(60)]
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2))  # its blocks are in the prefix cache now
        output = llm.generate(prompt, params)[0]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    reference = torch.log_softmax(models.oracle_logits("glassllm", prompt).double(), -1)
    assert len(output.prompt_logprobs) == len(prompt)
    for position, item in enumerate(output.prompt_logprobs[1:]):
        assert item is not None
        assert item.token_id == prompt[position + 1]
        assert item.logprob == pytest.approx(float(reference[position, item.token_id]), abs=1e-3)
        assert [t for t, _ in item.top] == reference[position].topk(3).indices.tolist()
