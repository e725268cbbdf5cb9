"""Greedy float32 tokens of real models do not depend on how many processes share them; and the twin agrees."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.executor.replay import ReplayExecutor, replay
from foretell.output import RequestOutput
from foretell.parallel.layout import make_layout, rank_parameters
from tests.model import models
from tests.unit.test_scheduler_invariants import trace_of

NEAR_TIE = 1e-4  # where the two likeliest logits are closer, another order of summing may choose the other
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_batched_tokens": 48,  # prompts come in chunks
    "kv_cache_bytes": 40_000_000,
    "num_threads": 2,
}


@cache
def prompts(name: str) -> list[list[int]]:
    rng, info = random.Random(3), models.info(name)
    stem = list(info.prompt)
    tails = [[rng.randrange(3, info.vocab_size) for _ in range(rng.randrange(1, 60))] for _ in range(3)]
    return [stem, *(stem + tail for tail in tails)]


def generate(llm: LLM, name: str) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False, logprobs=2)
    return llm.generate(prompts(name), params, progress=False)


@cache
def expected(name: str) -> list[RequestOutput]:
    with LLM(str(models.prepare(name)), **OPTIONS) as llm:
        return generate(llm, name)


def check_tokens(found: list[RequestOutput], wanted: list[RequestOutput]) -> int:
    """Divergences, each at a near tie, or the test fails."""
    divergences = 0
    for ours, reference in zip(found, wanted, strict=True):
        mine, theirs = ours.outputs[0], reference.outputs[0]
        at = next((i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=True)) if a != b), None)
        if at is not None:
            assert theirs.logprobs is not None
            (_, first), (_, second) = theirs.logprobs[at].top
            assert first - second < NEAR_TIE, f"token {at} differs where the reference is sure"
            divergences += 1
    return divergences


LAYOUTS = [
    *(("smollm2", tp, pp) for tp, pp in ((3, 1), (1, 2))),
    ("smollm2-mha", 3, 1),
    *(("microformer", tp, pp) for tp, pp in ((2, 1), (4, 1), (1, 3), (2, 2))),
    *(("gemma3-270m", tp, pp) for tp, pp in ((4, 1), (2, 2))),
]
LONG = [
    *(("smollm2", tp, pp) for tp, pp in ((1, 3), (1, 4), (3, 2))),
    *(("smollm2-mha", 1, pp) for pp in (2, 3, 4)),
    *(("microformer", 1, pp) for pp in (2, 4)),
    *(("gemma3-270m", tp, pp) for tp, pp in ((2, 1), (1, 2), (1, 3), (1, 4))),
]


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]
)
def test_same_tokens_whatever_the_layout(name: str, tp: int, pp: int) -> None:
    events: list[dict[str, Any]] = []
    with LLM(str(models.prepare(name)), tp=tp, pp=pp, on_event=events.append, **OPTIONS) as llm:
        executor = llm.assembly.engine.executor
        batches: list[Any] = []
        submit = executor.submit
        executor.submit = lambda batch: (batches.append(batch), submit(batch))[1]  # type: ignore[method-assign]
        assert check_tokens(generate(llm, name), expected(name)) == 0  # none on these prompts
        scheduler = llm.assembly.engine.scheduler
        assert all(pool.num_free == pool.num_blocks for pool in scheduler.blocks.pools)
        check_twin(llm, scheduler.config, events, batches)
        check_ledger(llm, tp, pp)


def check_twin(llm: LLM, config: SchedulerConfig, events: list[dict[str, Any]], batches: list[Any]) -> None:
    """From the event log alone the virtual executor decides the same, step by step."""
    executor = llm.assembly.engine.executor
    twin = ReplayExecutor(executor.num_blocks, depth=executor.depth, chain=executor.chain)
    replay(events, Engine(config, twin, [group.window for group in llm.spec.kv_groups]))
    assert batches
    assert trace_of(twin.submitted) == trace_of(batches)


def check_ledger(llm: LLM, tp: int, pp: int) -> None:
    """What each rank keeps is what the ledger says, but for padding in the kernels' panels."""
    from foretell.executor.parallel import ParallelExecutor, ready_of

    executor = llm.assembly.engine.executor
    assert isinstance(executor, ParallelExecutor)
    planned = rank_parameters(llm.spec, make_layout(llm.spec, tp, pp))
    for ready, parameters in zip(ready_of(executor.ranks), planned, strict=True):
        assert ready.weight_bytes == pytest.approx(4 * parameters, rel=0.1)
        if 4 * parameters > 50_000_000:  # below that, the allocator's own habits show
            assert ready.resident_bytes == pytest.approx(4 * parameters, rel=0.1)


def test_sampling_and_logprobs_are_those_of_one_process() -> None:
    """Seeds, penalties, prompt log-probabilities and grammar-free options take the same path on the sampling rank."""
    name, ids = "glassllm", [list(models.info("glassllm").prompt), [5, 17, 99, 3]]
    params = SamplingParams(
        temperature=0.9, seed=5, max_tokens=12, repetition_penalty=1.2, prompt_logprobs=2, detokenize=False
    )
    found = []
    for layout in ({}, {"tp": 2, "pp": 2}):
        with LLM(str(models.prepare(name)), **{**OPTIONS, **layout}) as llm:
            found.append(llm.generate(ids, params, progress=False))
            if layout:
                check_that_who_leaves_is_forgotten(llm)
    for one, many in zip(*found, strict=True):
        assert one.outputs[0].token_ids == many.outputs[0].token_ids
        assert one.prompt_logprobs is not None
        assert many.prompt_logprobs is not None
        for a, b in zip(one.prompt_logprobs[1:], many.prompt_logprobs[1:], strict=True):
            assert a is not None
            assert b is not None
            assert a.token_id == b.token_id
            assert abs(a.logprob - b.logprob) < 1e-4


def check_that_who_leaves_is_forgotten(llm: LLM) -> None:
    """Also where a token of it comes back when the ranks have been told already that it is gone."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    for i in range(6):
        streams = [llm.stream([5, i, j], params) for j in range(4)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False))
    assert len(llm.assembly.engine.executor._tokens) <= 1  # type: ignore[attr-defined]


def test_dummy_weights_do_not_depend_on_the_layout(tmp_path: Any) -> None:
    import json

    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 99, "hidden_size": 32, "intermediate_size": 45,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, logprobs=0)
    found = []
    for layout in ({}, {"tp": 2}):
        with LLM(str(tmp_path), load_format="dummy", **{**OPTIONS, **layout}) as llm:
            (output,) = llm.generate([[1, 2, 3]], params, progress=False)
            assert output.outputs[0].logprobs is not None
            found.append(torch.tensor([item.logprob for item in output.outputs[0].logprobs]))
    assert torch.allclose(found[0], found[1], atol=1e-5)
