"""Greedy text over HTTP is the offline one, byte for byte, in float32: streamed or whole, alone or in company."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from foretell.core.params import SamplingParams
from foretell.llm import LLM
from tests.model import models
from tests.server.served import served, streamed, whole
from tests.server.tiny import tiny_folder

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea, there lived",
    "2 + 2 = 4, 3 + 3 =",
    "Grüße aus Köln, 你好, привет 🙂🙂",
    "a",
    "List three colours:\n1.",
    "The quick brown fox " * 12,
]


def check(model: str, max_tokens: int, **options: Any) -> None:
    options = {"dtype": "float32", "kv_cache_bytes": 300 << 20, "max_model_len": 512, **options}
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with LLM(model, **options) as llm:
        outputs = llm.generate(PROMPTS, params, progress=False)
        expected = {output.prompt: output.outputs[0].text for output in outputs}
    assert len(set(expected.values())) > len(PROMPTS) // 2

    async def scenario() -> None:
        async with served(command=(), model=model, timeout_seconds=600, max_num_seqs=64, **options) as server:
            for prompt in PROMPTS:
                for ask in (streamed, whole):
                    assert (await ask(server.http, prompt, max_tokens)).text == expected[prompt]
            many = [(PROMPTS[i % len(PROMPTS)], (streamed, whole)[i // 8 % 2]) for i in range(64)]
            answers = await asyncio.gather(*(ask(server.http, prompt, max_tokens) for prompt, ask in many))
            assert [a.text for a in answers] == [expected[prompt] for prompt, _ in many]

    asyncio.run(scenario())


def test_a_small_model() -> None:
    check(str(tiny_folder()), 40, load_format="dummy", kv_cache_bytes=16 << 20)


@pytest.mark.slow
def test_a_real_model() -> None:
    check(str(models.prepare("smollm2")), 32)
