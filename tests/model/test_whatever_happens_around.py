"""The same request gives the same tokens whatever is in the batch with it, however it is cut into chunks and
blocks, under every policy, with and without the prefix cache, and through preemptions: on a small real model."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.local import LocalExecutor
from foretell.executor.replay import ReplayExecutor, replay
from foretell.worker.kv import allocate
from foretell.worker.runner import ModelRunner
from tests.model.loading import load
from tests.unit.test_scheduler_invariants import trace_of

POLICIES = ["prefill-first", "decode-first", "mixed"]
PROMPT_COUNT = 12


@cache
def requests() -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(1)
    stem = [rng.randrange(1024) for _ in range(40)]
    found = []
    for i in range(PROMPT_COUNT):
        prompt = stem[: rng.randrange(0, 40)] + [rng.randrange(1024) for _ in range(rng.randrange(1, 30))]
        sampled: dict[str, Any] = {"temperature": 0.0}
        if i % 3 == 1:
            sampled = {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if i % 3 == 2:
            sampled = {"temperature": 1.1, "seed": i, "repetition_penalty": 1.3, "frequency_penalty": 0.5}
        found.append((prompt, SamplingParams(max_tokens=rng.randrange(1, 24), **sampled)))
    return found


class Recorder(LocalExecutor):
    """A local executor that keeps the batches it ran."""

    def __init__(self, runner: ModelRunner, num_blocks: tuple[int, ...]) -> None:
        super().__init__(runner, num_blocks)
        self.batches: list[Any] = []

    def submit(self, batch: Any) -> None:
        self.batches.append(batch)
        super().submit(batch)


def make_engine(config: SchedulerConfig, num_blocks: int, events: list[Any]) -> Engine:
    model = load("glassllm", torch.float32)
    kv = allocate(model.spec, (num_blocks,), config.block_size, torch.float32)
    for layer in kv:  # what was never written must never be read
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    executor = Recorder(ModelRunner(model, kv, config.block_size), (num_blocks,))
    return Engine(config, executor, on_event=events.append)


@cache
def expected() -> list[list[int]]:
    """Each request alone, whole prompt in one chunk."""
    results = []
    for i, (prompt, params) in enumerate(requests()):
        engine = make_engine(SchedulerConfig(max_model_len=128), 16, [])
        engine.add(i, prompt, params)
        results.append(run(engine)[i])
    return results


def run(engine: Engine, arrivals: dict[int, list[int]] | None = None, preempt: float = 0.0, seed: int = 0) -> Any:
    rng = random.Random(seed)
    outputs: dict[int, list[int]] = {}
    turn = 0
    while engine.has_work or (arrivals and max(arrivals) >= turn):
        for i in (arrivals or {}).get(turn, []):
            engine.add(i, *requests()[i])
        for request in list(engine.scheduler.running):
            if rng.random() < preempt and turn < 150:
                engine.preempt(request.id)
        for out in engine.step() if engine.has_work else []:
            assert out.error is None, out.error
            if out.token_id is not None:
                outputs.setdefault(out.request_id, []).append(out.token_id)
        turn += 1
    return outputs


@settings(max_examples=20, deadline=None)
@given(
    budget=st.sampled_from([1, 3, 16, 64, 512]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    policy=st.sampled_from(POLICIES),
    caching=st.booleans(),
    preempt=st.sampled_from([0.0, 0.3, 1.0]),
    spare_blocks=st.integers(0, 60),
    chosen=st.sets(st.integers(0, PROMPT_COUNT - 1), min_size=1),
    seed=st.integers(0, 1000),
)
def test_same_tokens_whatever_happens_around_and_the_twin_agrees(
    budget: int,
    block_size: int,
    policy: Any,
    caching: bool,
    preempt: float,
    spare_blocks: int,
    chosen: set[int],
    seed: int,
) -> None:
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        max_model_len=128,
        block_size=block_size,
        policy=policy,
        enable_prefix_caching=caching,
    )
    num_blocks = -(-100 // block_size) + spare_blocks
    events: list[Any] = []
    engine = make_engine(config, num_blocks, events)
    rng = random.Random(seed)
    arrivals: dict[int, list[int]] = {}
    for i in chosen:
        arrivals.setdefault(rng.randrange(0, 12), []).append(i)
    outputs = run(engine, arrivals, preempt, seed)
    assert outputs == {i: expected()[i] for i in chosen}
    assert all(pool.num_free == pool.num_blocks for pool in engine.scheduler.blocks.pools)
    # the twin: from the event log alone, the virtual executor decides the same
    twin = ReplayExecutor((num_blocks,))
    replay(events, Engine(config, twin))
    executor: Any = engine.executor
    assert trace_of(twin.submitted) == trace_of(executor.batches)
