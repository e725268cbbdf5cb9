"""Named invariants of the scheduler, as properties over random workloads, caches, policies and pipelines."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.core.request import State
from foretell.errors import InvalidRequestError
from foretell.executor.replay import ReplayExecutor, replay
from tests.unit.history_executor import EOS, HistoryExecutor, reference_output

POLICIES = ["prefill-first", "decode-first", "mixed"]


@st.composite
def setups(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    windows = draw(st.sampled_from([(None,), (None, 5), (9,), (None, 3, 17)]))
    num_blocks = tuple(
        draw(st.integers(3, 40)) if w is None else -(-w // block_size) + draw(st.integers(2, 12)) for w in windows
    )
    depth, chain = draw(st.sampled_from([(1, 0), (2, 1), (2, 0), (4, 0), (3, 2)]))
    return {
        "config": SchedulerConfig(
            max_num_seqs=draw(st.integers(1, 12)),
            max_num_batched_tokens=draw(st.integers(1, 64)),
            max_model_len=draw(st.integers(8, 150)),
            max_chunk_tokens=draw(st.sampled_from([0, 1, 7])),
            block_size=block_size,
            policy=draw(st.sampled_from(POLICIES)),
            enable_prefix_caching=draw(st.booleans()),
            watermark=draw(st.sampled_from([0.0, 0.01, 0.2])),
            starvation_turns=draw(st.sampled_from([1, 4, 64])),
            admission_batch=draw(st.sampled_from([1, 1, 3, 9])),
        ),
        "windows": windows,
        "num_blocks": num_blocks,
        "depth": depth,
        "chain": chain,
        "seed": draw(st.integers(0, 2**32)),
        "n": draw(st.integers(1, 25)),
        "force": draw(st.sampled_from([0.0, 0.2, 1.0])),
        "aborts": draw(st.sampled_from([0.0, 0.05])),
    }


class Run:
    """Drives an engine with random arrivals, shared prefixes, forced preemptions, aborts and policy switches."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.setup, self.events = setup, []
        self.random = random.Random(setup["seed"])
        self.executor = HistoryExecutor(
            setup["num_blocks"],
            setup["windows"],
            setup["config"].block_size,
            depth=setup["depth"],
            chain=setup["chain"],
        )
        self.records: list[dict[str, Any]] = []
        self.engine = Engine(
            setup["config"],
            self.executor,
            setup["windows"],
            on_event=self.events.append,
            on_step=self.records.append,
        )
        self.prompts: dict[int, list[int]] = {}
        self.params: dict[int, SamplingParams] = {}
        self.outputs: dict[int, list[int]] = {}
        self.finished: dict[int, str] = {}
        self.refused = 0

    def arrive(self, request_id: int) -> None:
        r = self.random
        shared = [(request_id % 3) * 10 + i % 4 for i in range(r.randrange(0, 40))]
        prompt = shared + [r.randrange(50) for _ in range(r.randrange(0, 30))]
        params = SamplingParams(
            max_tokens=r.choice([None, 1, 5, 30]), eos_token_ids=(EOS,), min_tokens=r.choice([0, 0, 1])
        )
        try:
            self.engine.add(request_id, prompt, params, priority=r.choice([0, 0, 0, 1, -1]))
        except InvalidRequestError:
            self.refused += 1
            return
        self.prompts[request_id], self.params[request_id] = prompt, params
        self.outputs[request_id] = []

    def step(self) -> None:
        for out in self.engine.step():
            assert out.request_id not in self.finished, "news of a request that had ended"
            if out.token_id is not None:
                self.outputs[out.request_id].append(out.token_id)
            if out.finish_reason:
                self.finished[out.request_id] = out.finish_reason

    def disturb(self) -> None:
        running = [r.id for r in self.engine.scheduler.running]
        for request_id in running:
            if self.random.random() < self.setup["force"] and self.random.random() < 0.5:
                self.engine.preempt(request_id)
        for request_id in list(self.outputs):
            if request_id not in self.finished and self.random.random() < self.setup["aborts"]:
                assert self.engine.finish(request_id)
                self.finished[request_id] = "abort"
        if self.random.random() < 0.02:
            self.engine.set_policy(self.random.choice(POLICIES))

    def drain(self) -> None:
        to_come = list(range(self.setup["n"]))
        turns = 0
        while to_come or self.engine.has_work:
            for _ in range(self.random.choice([0, 0, 1, 3])):
                if to_come:
                    self.arrive(to_come.pop(0))
            if turns < 200:
                self.disturb()
            if self.engine.has_work:
                self.step()
            turns += 1
            assert turns < 60_000, "the run does not end"


@settings(max_examples=120, deadline=None)
@given(setups())
def test_same_tokens_every_request_answered_once_and_all_blocks_returned(setup: dict[str, Any]) -> None:
    run = Run(setup)
    run.drain()
    limit = min(setup["config"].max_model_len, run.engine.scheduler.blocks.max_tokens_per_request)
    assert set(run.finished) == set(run.outputs)
    for request_id, outputs in run.outputs.items():
        expected = reference_output(run.prompts[request_id], run.params[request_id], limit)
        if run.finished[request_id] == "abort":
            assert outputs == expected[: len(outputs)]
        else:
            assert outputs == expected
    for pool in run.engine.scheduler.blocks.pools:
        assert pool.num_free == pool.num_blocks
        assert not any(pool.references)
        assert {pool.hash_of[b] for b in pool.cached.values()} == set(pool.cached)
    assert not run.engine.scheduler.requests
    assert not run.engine.scheduler.blocks.expected


@settings(max_examples=120, deadline=None)
@given(setups())
def test_batches_respect_budget_sequences_phases_and_order(setup: dict[str, Any]) -> None:
    run = Run(setup)
    run.drain()
    config = setup["config"]
    for batch, record in zip(run.executor.batches, run.records, strict=True):
        assert 1 <= batch.num_tokens <= config.max_num_batched_tokens
        assert len(batch.chunks) <= config.max_num_seqs
        assert len({c.request_id for c in batch.chunks}) == len(batch.chunks)
        assert record["batch"] == batch.id
    switched = any(e["event"] == "policy" for e in run.events)
    if config.policy != "mixed" and not switched:
        for record in run.records:
            assert len({c["phase"] for c in record["chunks"]}) == 1, "phases share a batch"


def trace_of(batches: list[Any]) -> list[Any]:
    return [
        (
            b.id,
            [(c.request_id, c.start, c.length, c.new_block_ids, c.sample) for c in b.chunks],
            [a.request_id for a in b.added],
            b.removed,
        )
        for b in batches
    ]


def twin_of(run: Run) -> tuple[list[Any], dict[str, int]]:
    setup = run.setup
    executor = ReplayExecutor(setup["num_blocks"], depth=setup["depth"], chain=setup["chain"])
    engine = Engine(setup["config"], executor, setup["windows"])
    replay(run.events, engine)
    return trace_of(executor.submitted), engine.scheduler.preemptions_by_reason


@settings(max_examples=100, deadline=None)
@given(setups())
def test_twin_replay_of_the_event_log_makes_identical_batches(setup: dict[str, Any]) -> None:
    run = Run(setup)
    run.drain()
    batches, preemptions = twin_of(run)
    assert batches == trace_of(run.executor.batches)
    assert preemptions == run.engine.scheduler.preemptions_by_reason


def busy_setup(policy: str = "mixed") -> dict[str, Any]:
    return {
        "config": SchedulerConfig(
            max_num_seqs=6,
            max_num_batched_tokens=24,
            max_model_len=120,
            block_size=4,
            policy=policy,  # type: ignore[arg-type]
            starvation_turns=8,
            watermark=0.1,
        ),
        "windows": (None, 9),
        "num_blocks": (40, 30),
        "depth": 1,
        "chain": 0,
        "seed": 3,
        "n": 40,
        "force": 0.1,
        "aborts": 0.01,
    }


def mutate_lifo_admission(scheduler: Any) -> None:
    original = scheduler.waiting.push

    def push(request: Any, turn: int) -> None:
        request.key = (request.key[0], -request.order)
        original(request, turn)

    scheduler.waiting.push = push


def mutate_victim(scheduler: Any) -> None:
    def preempt_first(request: Any) -> bool:
        victims = [r for r in scheduler.running if r.key > request.key and r.in_flight == 0]
        return bool(victims) and scheduler.preempt(min(victims, key=lambda r: r.key).id, "kv_blocks_exhausted")

    scheduler._preempt_for = preempt_first


def mutate_eviction(scheduler: Any) -> None:
    for pool in scheduler.blocks.pools:

        def take(count: int, pool: Any = pool, take: Any = pool.take) -> list[int]:
            for block in reversed(list(pool.free)):
                pool.free.move_to_end(block, last=False)  # most recently used is evicted first
                if pool.num_free:
                    break
            return list(take(count))

        pool.take = take


def mutate_no_publish(scheduler: Any) -> None:
    scheduler.blocks.publish = lambda request, computed: None


def mutate_chunk_cap(scheduler: Any) -> None:
    scheduler.chunk_cap -= 1


def mutate_watermark(scheduler: Any) -> None:
    scheduler.admission.watermark_blocks = 0


def mutate_ageing(scheduler: Any) -> None:
    scheduler.waiting._promote_aged = lambda turn: None


def mutate_reservation(scheduler: Any) -> None:
    scheduler.admission._reserved_blocks = lambda: [0] * len(scheduler.blocks.pools)


def mutate_shared_prefix(scheduler: Any) -> None:
    scheduler.blocks.awaited = lambda request, cached: None


MUTATIONS = [
    mutate_lifo_admission,
    mutate_victim,
    mutate_eviction,
    mutate_no_publish,
    mutate_chunk_cap,
    mutate_watermark,
    mutate_ageing,
    mutate_reservation,
    mutate_shared_prefix,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_twin_notices_a_mutated_scheduler(mutate: Any) -> None:
    """Each deliberate change of the scheduler must show as a different run on at least one busy workload."""
    for seed in range(12):
        for policy in POLICIES:
            run = Run({**busy_setup(policy), "seed": seed})
            run.drain()
            executor = ReplayExecutor(run.setup["num_blocks"])
            engine = Engine(run.setup["config"], executor, run.setup["windows"])
            mutate(engine.scheduler)
            try:
                replay(run.events, engine)
            except (KeyError, RuntimeError):
                return
            if trace_of(executor.submitted) != trace_of(run.executor.batches):
                return
    pytest.fail("the twin did not notice")


@settings(max_examples=60, deadline=None)
@given(setups())
def test_no_starvation_once_aged_nobody_younger_is_admitted_first(setup: dict[str, Any]) -> None:
    """The bound: after ``starvation_turns`` turns in the queue, no request that has waited less goes before."""
    run = Run({**setup, "force": 0.0, "aborts": 0.0})
    scheduler = run.engine.scheduler
    limit = setup["config"].starvation_turns
    original = scheduler._finish_admission

    def watch(request: Any, *rest: Any) -> None:
        for other in scheduler.requests.values():
            if other is not request and other.state is State.WAITING and scheduler.turn - other.last_turn >= limit:
                assert request.key[0] <= other.key[0] == -(2**62), "a request overtook one that was aged"
        original(request, *rest)

    scheduler._finish_admission = watch  # type: ignore[method-assign]
    run.drain()


def test_a_full_engine_admits_several_at_once_but_waits_no_longer_than_as_many_turns() -> None:
    def joined(batch: int, lengths: list[int]) -> list[int]:
        """How many prompts each batch began, with four sequences and requests of these output lengths."""
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, admission_batch=batch)
        executor = HistoryExecutor((64,), (None,), 16)
        engine = Engine(config, executor)
        for i, length in enumerate(lengths):
            engine.add(i, [i + 1, 2, 3], SamplingParams(max_tokens=length, ignore_eos=True))
        while engine.has_work:
            engine.step()
        return [len(b.added) for b in executor.batches if b.added]

    lengths = [2, 4, 6, 8, *[5] * 6]
    assert joined(1, lengths)[:4] == [4, 1, 1, 1]
    assert joined(3, lengths)[:2] == [4, 2]  # the third turn after the first was free
    assert joined(2, [3, 3, 20, 20, 5, 5]) == [4, 2]
    assert joined(4, [2, 9, 9, 9, 5]) == [4, 1]  # all that wait
