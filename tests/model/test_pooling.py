"""Embeddings: transformers' hidden states, pooled; the same however a prompt is cut and whatever shares its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.errors import InvalidRequestError
from foretell.executor.replay import ReplayExecutor, replay
from tests.model import models
from tests.model import test_device_runner as device
from tests.model import test_whatever_happens_around as plain

PROMPTS = [[1, 88, 500, 91, 1023, 300, 7], [5], list(range(40, 75)), [1, 88, 500, 91, 1023, 300, 7, 8, 9]]


@torch.inference_mode()
def wanted(name: str, prompt: list[int], pooling: str) -> torch.Tensor:
    hidden = models.oracle(name).model(torch.tensor([prompt])).last_hidden_state[0].double()
    return torch.nn.functional.normalize(hidden.mean(0) if pooling == "mean" else hidden[-1], dim=0)


def close(found: list[float] | None, expected: torch.Tensor) -> bool:
    assert found is not None
    return bool(torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=2e-6, rtol=0))


@pytest.mark.parametrize("budget", [1, 3, 16, 512])
@pytest.mark.parametrize("runner", ["plain", "device"])
def test_equals_transformers_however_it_is_cut_and_the_twin_agrees(runner: str, budget: int) -> None:
    config = SchedulerConfig(
        max_num_seqs=min(8, budget), max_num_batched_tokens=budget, max_model_len=128, block_size=4
    )
    events: list[Any] = []
    engine: Engine
    if runner == "plain":
        engine = plain.make_engine(config, 60, events)
    else:
        engine = device.make_engine(config, 60, events, padded=True)
    found: dict[int, list[float]] = {}
    for again in range(2):  # the second time a cached prefix would be at hand
        for i, prompt in enumerate(PROMPTS):
            for j, pooling in enumerate(("mean", "last")):
                engine.add(100 * again + 10 * i + j, prompt, SamplingParams(pooling=pooling))  # type: ignore[arg-type]
        engine.add(100 * again + 99, PROMPTS[0], SamplingParams(temperature=0, max_tokens=4))
        steps = 0
        while engine.has_work:
            for output in engine.step():
                if output.embedding is not None:
                    assert output.finish_reason == "stop"
                    assert output.token_id is None
                    found[output.request_id] = output.embedding
            steps += 1
            if steps == 2 and engine.scheduler.running:
                engine.preempt(engine.scheduler.running[0].id)
    for i, prompt in enumerate(PROMPTS):
        for j, pooling in enumerate(("mean", "last")):
            expected = wanted("glassllm", prompt, pooling)
            assert close(found[10 * i + j], expected)
            assert close(found[100 + 10 * i + j], expected)
    assert all(pool.num_free == pool.num_blocks for pool in engine.scheduler.blocks.pools)
    assert engine.scheduler.counters.prompt_tokens == 2 * (2 * sum(map(len, PROMPTS)) + len(PROMPTS[0]))
    executor: Any = engine.executor
    twin = ReplayExecutor((60,), depth=executor.depth, chain=executor.chain)
    replay(events, Engine(config, twin))
    assert plain.trace_of(twin.submitted) == plain.trace_of(executor.batches)


def test_embed_on_the_default_model() -> None:
    name = "smollm2"
    texts = ["The cat sits on the mat.", "A cat is sitting on a mat.", "Interest rates rose by half a percent."]
    with LLM(str(models.prepare(name)), dtype="float32", max_model_len=256, kv_cache_bytes=50_000_000) as llm:
        found = llm.embed(texts)
        last = llm.embed(texts[0], pooling="last")
        assert llm.tokenizer is not None
        ids = [llm.tokenizer.encode(text) for text in texts]
        with pytest.raises(InvalidRequestError, match="pooling"):
            llm.embed("x", pooling="max")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="prompt 1"):
            llm.embed(["x", ""])
    assert all(close(f, wanted(name, i, "mean")) for f, i in zip(found, ids, strict=True))
    assert close(last[0], wanted(name, ids[0], "last"))
    near, far = (sum(a * b for a, b in zip(found[0], other, strict=True)) for other in found[1:])
    assert near > far
