"""The runner for devices, on CPU tensors: static buffers, slots, chained tokens and padded steps give the tokens
of the plain runner, whatever happens around."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.overlapped import OverlappedExecutor
from foretell.executor.replay import ReplayExecutor, replay
from foretell.worker.cuda_graphs import Work, graph_sizes
from foretell.worker.device_runner import DeviceRunner, largest_step
from foretell.worker.kv import allocate
from tests.model.loading import load
from tests.model.test_whatever_happens_around import POLICIES, PROMPT_COUNT, expected, requests, run
from tests.unit.test_scheduler_invariants import trace_of


class PaddedSteps:
    """What CUDA graphs do to a step's shape, without CUDA."""

    def __init__(self, max_num_seqs: int) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self.used: set[int] = set()

    def size_for(self, num_seqs: int) -> int:
        return next((size for size in self.sizes if size >= num_seqs), 0)

    def run(self, size: int, work: Work) -> torch.Tensor:
        self.used.add(size)
        return work(size)

    def release(self) -> None: ...


class Recorder(OverlappedExecutor):
    def __init__(self, runner: DeviceRunner, num_blocks: tuple[int, ...]) -> None:
        super().__init__(runner, num_blocks)
        self.batches: list[Any] = []

    def submit(self, batch: Any) -> None:
        self.batches.append(batch)
        super().submit(batch)


def make_engine(config: SchedulerConfig, num_blocks: int, events: list[Any], *, padded: bool) -> Engine:
    model = load("glassllm", torch.float32)
    kv = allocate(model.spec, (num_blocks + 1,), config.block_size, torch.float32)
    for layer in kv:  # what was never written must never be read
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    graphs = PaddedSteps(config.max_num_seqs) if padded else None
    runner = DeviceRunner(model, kv, config, (num_blocks,), torch.device("cpu"), graphs=graphs)
    return Engine(config, Recorder(runner, (num_blocks,)), on_event=events.append)


@settings(max_examples=16, deadline=None)
@given(
    budget=st.sampled_from([1, 3, 16, 64, 512]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    policy=st.sampled_from(POLICIES),
    caching=st.booleans(),
    preempt=st.sampled_from([0.0, 0.3, 1.0]),
    spare_blocks=st.integers(0, 60),
    chosen=st.sets(st.integers(0, PROMPT_COUNT - 1), min_size=1),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_same_tokens_as_the_plain_runner_and_the_twin_agrees(
    budget: int,
    block_size: int,
    policy: Any,
    caching: bool,
    preempt: float,
    spare_blocks: int,
    chosen: set[int],
    padded: bool,
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
    engine = make_engine(config, num_blocks, events, padded=padded)
    rng = random.Random(seed)
    arrivals: dict[int, list[int]] = {}
    for i in chosen:
        arrivals.setdefault(rng.randrange(0, 12), []).append(i)
    outputs = run(engine, arrivals, preempt, seed)
    assert outputs == {i: expected()[i] for i in chosen}
    assert all(pool.num_free == pool.num_blocks for pool in engine.scheduler.blocks.pools)
    executor: Any = engine.executor
    twin = ReplayExecutor((num_blocks,), depth=executor.depth, chain=executor.chain)
    replay(events, Engine(config, twin))
    assert trace_of(twin.submitted) == trace_of(executor.batches)
    assert len(executor.runner.free_slots) + len(executor.runner.states) == config.max_num_seqs


@cache
def plain_config() -> SchedulerConfig:
    return SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128)


def drain(engine: Engine) -> dict[int, list[Any]]:
    news: dict[int, list[Any]] = {}
    while engine.has_work:
        for output in engine.step():
            news.setdefault(output.request_id, []).append(replace(output, progress=None))
    return news


def test_decodes_are_chained_unless_the_next_token_takes_the_cpu() -> None:
    engine = make_engine(plain_config(), 40, [], padded=True)
    executor: Any = engine.executor
    engine.add(0, [5, 6, 7], SamplingParams(temperature=0, max_tokens=8))
    engine.add(1, [5, 6, 7], SamplingParams(temperature=0, max_tokens=8, logprobs=2))
    pending: dict[int, list[int]] = {0: [], 1: []}
    submit = executor.submit

    def watch(batch: Any) -> None:
        for chunk in batch.chunks:
            pending[chunk.request_id].append(engine.scheduler.requests[chunk.request_id].pending)
        submit(batch)

    executor.submit = watch
    drain(engine)
    assert pending == {0: [1] + [2] * 7, 1: [1] * 8}
    assert executor.runner.graphs.used == {1, 2}


def test_logprobs_bans_and_prompt_logprobs_equal_the_plain_runners() -> None:
    from tests.model.test_whatever_happens_around import make_engine as plain_engine

    wanted = [
        SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=0, max_tokens=6, logit_bias={3: 5.0}, allowed_token_ids=[3, 4, 5]),
        SamplingParams(temperature=0.9, seed=4, max_tokens=9, top_k=5, min_p=0.05),
        SamplingParams(temperature=0.9, seed=4, max_tokens=9, top_k=400, top_p=0.7),
        SamplingParams(temperature=0, max_tokens=6, bad_token_ids=[[9]], min_tokens=3, eos_token_ids=[1]),
        SamplingParams(temperature=1.2, seed=8, max_tokens=12, presence_penalty=1.0),
    ]
    found = []
    for engine in (plain_engine(plain_config(), 60, []), make_engine(plain_config(), 60, [], padded=True)):
        for i, params in enumerate(wanted):
            engine.add(i, [5 + i, 6, 7, 100, 8], params)
        found.append(drain(engine))
    assert found[0] == found[1]


def test_a_row_that_is_not_finite_fails_alone_and_leaves_nothing_behind() -> None:
    """One embedding is NaN: the request that meets it ends with an error, also when it is chained; its blocks,
    used again by others, do them no harm."""
    engine = make_engine(plain_config(), 12, [], padded=True)
    executor: Any = engine.executor
    model = executor.runner.model
    table = model.embedding.tokens
    original = table[77].clone()
    try:
        with torch.no_grad():
            table[77] = float("nan")
        for i, (prompt, params) in enumerate(requests()[:3]):
            engine.add(i, [t for t in prompt if t != 77], params)
        engine.add(9, [5, 77, 6], SamplingParams(temperature=0, max_tokens=9))
        engine.add(10, [5, 77], SamplingParams(temperature=0.7, seed=1, max_tokens=9))
        news = drain(engine)
        again = {i: [o.token_id for o in news[i]] for i in range(3)}
        engine.add(20, requests()[0][0], requests()[0][1])
        later = [o.token_id for o in drain(engine)[20]]
    finally:
        with torch.no_grad():
            table[77] = original
    for i in (9, 10):
        assert [o.finish_reason for o in news[i]] == ["error"]
        assert "not finite" in news[i][0].error
    assert [again[i] for i in range(3)] == expected()[:3]
    assert later == expected()[0]


def test_a_step_that_cannot_be_launched_ends_its_requests_and_no_others() -> None:
    engine = make_engine(plain_config(), 40, [], padded=False)
    executor: Any = engine.executor
    forward = executor.runner.model.forward

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def forward(self, *args: Any) -> Any:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    model = executor.runner.model
    assert forward is not None
    executor.runner.model = Failing()
    engine.add(0, *requests()[0])
    news = drain(engine)
    assert "out of memory" in news[0][0].error
    executor.runner.model = model
    engine.add(1, *requests()[1])
    assert [o.token_id for o in drain(engine)[1]] == expected()[1]


def test_a_prefix_hit_longer_than_a_steps_block_still_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.worker.step_buffers.INLINE_BLOCKS", 0)
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=128, block_size=1)
    engine = make_engine(config, 128, [], padded=False)
    prompt = [(7 * i) % 1000 for i in range(90)]
    engine.add(0, prompt, SamplingParams(temperature=0, max_tokens=5))
    first = [o.token_id for o in drain(engine)[0]]
    engine.add(1, prompt, SamplingParams(temperature=0, max_tokens=5))
    assert [o.token_id for o in drain(engine)[1]] == first


def test_graph_sizes_hold_every_number_of_sequences_and_waste_little() -> None:
    for most in (1, 2, 3, 5, 64, 100, 512):
        sizes = graph_sizes(most)
        assert sizes[-1] == most
        assert list(sizes) == sorted(set(sizes))
        for count in range(9, most + 1):
            assert min(s for s in sizes if s >= count) <= 1.9 * count
    assert len(graph_sizes(512)) < 50


@given(seqs=st.integers(1, 8), tokens=st.integers(1, 600), length=st.integers(1, 128))
def test_the_largest_step_has_as_many_tokens_as_any(seqs: int, tokens: int, length: int) -> None:
    tokens = max(tokens, seqs)
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length)
    count, each = largest_step(config)
    assert count <= seqs
    assert each <= length
    possible = min(tokens, seqs * length)
    assert possible - count < count * each <= possible


@pytest.mark.parametrize(("seqs", "tokens", "length"), [(8, 64, 16), (2, 64, 16), (8, 64, 64), (8, 8, 1)])
def test_a_step_of_padding_is_like_any(seqs: int, tokens: int, length: int) -> None:
    """Its memory is what the plan for a GPU is made of: it must run for any shape."""
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length, block_size=4)
    executor: Any = make_engine(config, 40, [], padded=False).executor
    count, each = largest_step(config)
    executor.runner._padding_step(count, count * each)
    assert executor.runner.buffers.kv_lens[:count].tolist() == [each] * count
