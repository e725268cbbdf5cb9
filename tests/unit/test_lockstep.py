"""Decodes in lockstep change nothing but the time that a simulation takes: beside the ordinary engine's steps."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.fast_forward import FastEngine
from foretell.core.group import GroupBatch, PlainPool, Together
from foretell.core.lockstep import LockstepScheduler
from foretell.core.messages import Batch, Chunk, Turn
from foretell.core.params import SamplingParams
from foretell.core.scheduler import Scheduler
from foretell.executor.lockstep import LockstepExecutor
from foretell.executor.virtual import LinearCost, VirtualExecutor, synthetic_token
from tests.unit.simulated import related_prompts

COST = LinearCost(0.004, 0.0003, 1e-6)


def told(chunk: Chunk) -> tuple[Any, ...]:
    return chunk.request_id, chunk.start, chunk.length, chunk.new_block_ids, chunk.sample


class Listed(LockstepScheduler):
    """Writes down every batch, the members one by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunks: list[Any] = []
        self.stepped = self.alone = self.dissolved = 0

    def _group(self, part: Together) -> list[Any]:
        members = sorted([*self.group.members.values(), *part.leavers], key=lambda member: member.request.key)
        self.stepped += 1
        return [told(self.chunk(member, part.step)) for member in members if member.joined < part.step]

    def step_alone(self) -> Together | None:
        part = super().step_alone()
        if part is not None:
            self.chunks.append(self._group(part))
            self.alone += 1
        return part

    def _submitted(self, batch: Batch) -> Turn:
        chunks = [told(chunk) for chunk in batch.chunks]
        if isinstance(batch, GroupBatch) and (part := batch.together) is not None:
            chunks[part.at : part.at] = self._group(part)
        self.chunks.append(chunks)
        return super()._submitted(batch)

    def dissolve(self) -> None:
        self.dissolved += bool(self.group.members)
        super().dissolve()


class Written(Scheduler):
    """Writes down every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunks: list[Any] = []

    def _submitted(self, batch: Batch) -> Turn:
        self.chunks.append([told(chunk) for chunk in batch.chunks])
        return super()._submitted(batch)


@dataclass
class Run:
    chunks: list[Any]
    state: Any = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)  # first and last token
    scheduled: dict[int, float | None] = field(default_factory=dict)
    engine: Any = None


def simulate(setup: dict[str, Any], *, together: bool) -> Run:
    depth, chain = setup.get("depth", (1, 0))
    engine: Any
    windows = (None,) * len(setup["num_blocks"])
    if together:
        clock = LockstepExecutor(COST, setup["num_blocks"], depth=depth, chain=chain)
        engine = FastEngine(setup["config"], clock, windows, scheduler=Listed)
    else:
        executor = VirtualExecutor(COST, setup["num_blocks"], depth=depth, chain=chain)
        engine = Engine(setup["config"], executor, windows, scheduler=Written)
    run = Run(engine.scheduler.chunks, engine=engine)
    arrivals = sorted(setup["arrivals"].items(), key=lambda item: (item[1], item[0]))
    requests = {}
    while arrivals or engine.has_work:
        while arrivals and arrivals[0][1] <= engine.executor.now:
            request_id, arrival = arrivals.pop(0)
            params = SamplingParams(temperature=0, max_tokens=setup["lengths"][request_id], ignore_eos=True)
            requests[request_id] = engine.add(
                request_id, setup["prompts"][request_id], params, arrival=arrival,
                priority=setup.get("priorities", {}).get(request_id, 0),
            )  # fmt: skip
        until = arrivals[0][1] if arrivals else None
        if together and (ended := engine.fast_forward(until)) is not None:
            for request_id, at in ended:
                run.times[request_id].append(at)
            continue
        for output in engine.step(until):
            if output.token_id is not None:
                seen = run.times.setdefault(output.request_id, [engine.executor.now])
                if output.finish_reason:
                    seen.append(engine.executor.now)
    scheduler = engine.scheduler
    run.tokens = {i: request.tokens for i, request in requests.items()}
    run.scheduled = {i: request.first_scheduled for i, request in requests.items()}
    run.state = (
        scheduler.turn, scheduler.num_batches, scheduler.counters, scheduler.admission.refusals,
        [(p.cached, _free(p), p.evictions) for p in scheduler.blocks.pools],
    )  # fmt: skip
    return run


def _free(pool: Any) -> list[int]:
    """The next one to be taken first."""
    return list(reversed(pool.free)) if isinstance(pool, PlainPool) else list(pool.free)


@st.composite
def setups(draw: Any) -> dict[str, Any]:
    rng = random.Random(draw(st.integers(0, 10_000)))
    count, size = draw(st.integers(1, 14)), draw(st.sampled_from([1, 4, 16]))
    longest = 120
    prompts = related_prompts(rng, count, longest)
    spare = draw(st.integers(0, 40))
    config = SchedulerConfig(
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 14])),
        max_num_batched_tokens=draw(st.sampled_from([14, 16, 64])),
        max_model_len=longest,
        max_chunk_tokens=draw(st.sampled_from([0, 0, 5])),
        block_size=size,
        policy=draw(st.sampled_from(["prefill-first", "decode-first", "mixed"])),
        enable_prefix_caching=draw(st.booleans()),
        starvation_turns=draw(st.sampled_from([3, 9, 64])),
        admission_batch=draw(st.sampled_from([1, 1, 3])),
    )
    return {
        "config": config,
        "num_blocks": (-(-(longest + size) // size) + 1 + spare,) * draw(st.sampled_from([1, 1, 2])),
        "depth": draw(st.sampled_from([(1, 0), (2, 1)])),
        "prompts": prompts,
        "priorities": {i: rng.choice((0, 0, 1)) for i in prompts},
        "lengths": {i: rng.randrange(1, 80) for i in prompts},
        "arrivals": {i: rng.random() * draw(st.sampled_from([0.0, 0.3, 3.0])) for i in prompts},
    }


def compare(setup: dict[str, Any]) -> Run:
    single, many = simulate(setup, together=False), simulate(setup, together=True)
    assert many.chunks == single.chunks
    assert many.tokens == single.tokens
    assert many.state == single.state
    assert many.scheduled == pytest.approx(single.scheduled, rel=1e-9)
    assert many.times.keys() == single.times.keys()
    for request_id, times in single.times.items():
        assert many.times[request_id] == pytest.approx(times, rel=1e-9)
    return many


@settings(max_examples=150, deadline=None)
@given(setups())
def test_the_same_batches_blocks_tokens_and_times(setup: dict[str, Any]) -> None:
    compare(setup)


def crowd(count: int = 8, **over: Any) -> dict[str, Any]:
    config = {"max_num_seqs": count, "max_num_batched_tokens": 64, "max_model_len": 400, "block_size": 4}
    return {
        "config": SchedulerConfig(**{**config, **over.pop("config", {})}),
        "num_blocks": (over.pop("num_blocks", 1000),),
        "prompts": {i: [i] * (5 + i) for i in range(count)},
        "lengths": {i: 200 - 10 * i for i in range(count)},
        "arrivals": dict.fromkeys(range(count), 0.0),
        **over,
    }


@pytest.mark.parametrize("depth", [(1, 0), (2, 1)])
def test_a_crowd_is_one_group_until_each_has_ended(depth: tuple[int, int]) -> None:
    run = compare(crowd(depth=depth))
    scheduler = run.engine.scheduler
    assert scheduler.dissolved == 0
    assert scheduler.alone > 190  # nearly all of 200 steps, although seven requests end meanwhile


@pytest.mark.parametrize("depth", [(1, 0), (2, 1)])
@pytest.mark.parametrize("config", [{}, {"enable_prefix_caching": False}])
def test_a_group_that_runs_out_of_blocks_is_dissolved_and_preempts(
    depth: tuple[int, int], config: dict[str, Any]
) -> None:
    run = compare(crowd(num_blocks=110, depth=depth, config=config))
    assert run.engine.scheduler.dissolved > 1
    assert run.engine.scheduler.counters.preemptions["kv_blocks_exhausted"] > 1


def test_a_group_larger_than_the_budget_is_never_formed_for_long() -> None:
    run = compare(crowd(config={"max_num_batched_tokens": 7}))
    assert run.engine.scheduler.dissolved


def test_who_may_stop_at_a_token_is_no_member() -> None:
    clock = LockstepExecutor(COST, (100,))
    engine = FastEngine(SchedulerConfig(max_model_len=100), clock)
    engine.add(0, [1] * 5, SamplingParams(max_tokens=9, stop_token_ids=(7,)))
    while engine.has_work:
        assert engine.fast_forward() is None
        engine.step()
        assert not engine.scheduler.group.members


def test_an_abort_ends_a_member_with_what_it_had() -> None:
    clock = LockstepExecutor(COST, (100,))
    engine = FastEngine(SchedulerConfig(max_model_len=100), clock)
    for i in range(3):
        engine.add(i, [i] * 5, SamplingParams(max_tokens=50, ignore_eos=True))
    aborted = engine.scheduler.requests[1]
    ended: dict[int, float] = {}
    while engine.has_work:
        ended.update(engine.fast_forward(clock.now + 0.05) or ())
        if aborted.finish_reason is None and clock.now > 0.1:
            assert engine.finish(1)
            assert aborted.tokens[5:] == [synthetic_token(1, n) for n in range(aborted.num_outputs)]
        for output in engine.step():
            if output.finish_reason:
                ended[output.request_id] = clock.now
    assert ended.keys() == {0, 2}
    assert 1 < aborted.num_outputs < 50
    assert engine.scheduler.blocks.usage == 0


def test_windows_and_pipelines_are_not_for_groups() -> None:
    with pytest.raises(RuntimeError, match="lockstep"):
        FastEngine(SchedulerConfig(), LockstepExecutor(COST, (100,)), (64,))
    with pytest.raises(RuntimeError, match="lockstep"):
        FastEngine(SchedulerConfig(), LockstepExecutor(COST, (100,), depth=3))
