"""Cases that a review of the core found wrong once, each as the smallest run that shows it."""

from __future__ import annotations

from typing import Any

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.virtual import LinearCost, VirtualExecutor
from tests.unit.test_scheduler_invariants import Run


def test_a_request_preempted_and_readmitted_in_one_turn_is_planned_once() -> None:
    """With a sliding window a victim gives back more than its return needs: it can be back within the turn."""
    setup: dict[str, Any] = {
        "config": SchedulerConfig(
            max_num_seqs=12, max_num_batched_tokens=64, max_model_len=160, max_chunk_tokens=40, block_size=3,
            watermark=0.0, starvation_turns=1000,
        ),
        "windows": (9,), "num_blocks": (15,), "depth": 2, "chain": 2,
        "seed": 854, "n": 35, "force": 0.2, "aborts": 0.0,
    }  # fmt: skip
    run = Run(setup)
    run.drain()
    for batch in run.executor.batches:
        assert len({chunk.request_id for chunk in batch.chunks}) == len(batch.chunks)


def test_a_request_ended_by_its_first_token_still_leaves_its_prompt_in_the_cache() -> None:
    engine = Engine(SchedulerConfig(), VirtualExecutor(LinearCost(), (64,)))
    for i in range(2):
        request = engine.add(i, list(range(100)), SamplingParams(max_tokens=1))
        while engine.has_work:
            engine.step()
    assert request.cached_tokens == 96


def test_a_lasting_overload_does_not_pile_up_stale_queue_entries() -> None:
    """Every request waits long enough to be aged, and the queue never runs dry."""
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, starvation_turns=2)
    engine = Engine(config, VirtualExecutor(LinearCost(), (64,)))
    for i in range(4000):
        engine.add(i, [i] * 8, SamplingParams(max_tokens=1), priority=i % 3)
        if i >= 40:
            engine.step()
    scheduler = engine.scheduler
    assert 10 < scheduler.num_waiting < 100
    assert scheduler.waiting.num_entries < 500


def test_waiting_requests_that_left_are_forgotten_while_others_keep_the_batch_full() -> None:
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, starvation_turns=10**9)
    engine = Engine(config, VirtualExecutor(LinearCost(), (64,)))
    engine.add(0, [1], SamplingParams(max_tokens=900))
    engine.add(1, [1], SamplingParams(max_tokens=1))
    for i in range(2, 800):
        engine.add(i, [i] * 8, SamplingParams())
        engine.step()
        engine.finish(i)
    assert engine.scheduler.waiting.num_entries < 100


def test_a_pipeline_s_batches_share_the_decodes_however_many_requests_wait() -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    records: list[dict[str, Any]] = []
    engine = Engine(config, VirtualExecutor(LinearCost(), (64,), depth=4), on_step=records.append)
    for i in range(100):
        engine.add(i, [i] * 4, SamplingParams(max_tokens=30))
    while engine.has_work:
        engine.step()
    assert max(len(record["chunks"]) for record in records) <= 2


def turns_until_scheduled(prompt_len: int, sliding_blocks: int, *, head_start: int = 1, **options: Any) -> int:
    """Engine steps until a second request runs beside the first, in a cache with a sliding group."""
    config = SchedulerConfig(max_num_batched_tokens=64, max_model_len=4000, block_size=4, **options)
    engine = Engine(config, VirtualExecutor(LinearCost(), (1000, sliding_blocks)), (None, 16))
    engine.add(0, [1] * prompt_len, SamplingParams(max_tokens=200))
    for _ in range(head_start):
        engine.step()
    second = engine.add(1, [2] * 100, SamplingParams(max_tokens=5))
    steps = 0
    while second.first_scheduled is None:
        engine.step()
        steps += 1
    while engine.has_work:
        engine.step()
    assert not engine.scheduler.preemptions_by_reason
    return steps


def test_a_long_prompt_reserves_a_window_of_a_sliding_group_not_all_its_tokens() -> None:
    assert turns_until_scheduled(800, sliding_blocks=40, max_chunk_tokens=8) == 1


def test_a_chunk_shrinks_to_what_a_sliding_group_has_free() -> None:
    assert turns_until_scheduled(4, sliding_blocks=12, head_start=30) == 1


def test_a_blocked_request_is_searched_in_the_cache_once_until_blocks_come_back() -> None:
    engine = Engine(SchedulerConfig(max_num_batched_tokens=512), VirtualExecutor(LinearCost(), (64,)))
    scheduler, shared = engine.scheduler, list(range(400))
    engine.add(0, shared, SamplingParams(max_tokens=100))
    engine.step()
    searched: list[int] = []
    find = scheduler.blocks.find_cached

    def counted(request: Any) -> int:
        searched.append(request.id)
        return find(request)

    scheduler.blocks.find_cached = counted  # type: ignore[method-assign]
    large = engine.add(1, [7] * 700, SamplingParams(max_tokens=1))
    engine.add(2, [8] * 700, SamplingParams(max_tokens=1))  # behind it, never looked at
    while large.first_scheduled is None:
        engine.step()
    assert searched == [1, 1]
    assert scheduler.counters.generation_tokens == 100  # it went in when the other one's blocks came back


def test_a_blocked_request_goes_on_as_soon_as_the_cache_holds_enough_of_its_prefix() -> None:
    """Nothing is given back meanwhile: the first request is still at work on the prompt they share."""
    config = SchedulerConfig(max_num_batched_tokens=64, watermark=0.0)
    engine = Engine(config, VirtualExecutor(LinearCost(), (40,)))
    first = engine.add(0, list(range(480)), SamplingParams(max_tokens=100))
    second = engine.add(1, list(range(480)), SamplingParams(max_tokens=100))
    while second.first_scheduled is None:
        engine.step()
    assert first.finish_reason is None
    assert second.cached_tokens > 300
