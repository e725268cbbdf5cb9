"""Requests that come together and begin alike: what they share is computed once, and nobody is held up by it."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.engine_loop import LocalPort
from foretell.executor.virtual import LinearCost, VirtualExecutor

PROMPT = list(range(100))  # six full blocks of 16 and four tokens
ANSWER = SamplingParams(max_tokens=8)


def engine_with(records: list[dict[str, Any]] | None = None, **options: Any) -> Engine:
    depth = options.pop("depth", 1)
    on_step = None if records is None else records.append
    return Engine(SchedulerConfig(**options), VirtualExecutor(LinearCost(), (400,), depth=depth), on_step=on_step)


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    assert not engine.scheduler.blocks.expected


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [0, 7, 16])
def test_a_prompt_asked_eight_times_at_once_is_computed_once(chunk: int, depth: int) -> None:
    records: list[dict[str, Any]] = []
    engine = engine_with(records, max_chunk_tokens=chunk, depth=depth)
    requests = [engine.add(i, PROMPT, ANSWER) for i in range(8)]
    drain(engine)
    prefill = sum(c["tokens"] for r in records for c in r["chunks"] if c["phase"] == "prefill")
    assert prefill == 100 + 7 * 4
    assert [r.cached_tokens for r in requests] == [0] + [96] * 7


def test_outputs_of_one_prompt_wait_for_the_one_that_reads_its_log_probabilities() -> None:
    records: list[dict[str, Any]] = []
    engine = engine_with(records)
    LocalPort(engine).add(
        0, PROMPT, SamplingParams(n=4, max_tokens=8, prompt_logprobs=2, seed=1), priority=0, arrival=0.0
    )
    requests = list(engine.scheduler.requests.values())
    drain(engine)
    prefill = sum(c["tokens"] for r in records for c in r["chunks"] if c["phase"] == "prefill")
    assert prefill == 100 + 3 * 4
    assert [r.params.prompt_logprobs for r in requests] == [2, None, None, None]
    assert len({r.params.seed for r in requests}) == 4


def test_who_shares_nothing_is_not_held_up_by_those_who_wait() -> None:
    engine = engine_with(max_num_batched_tokens=64)
    for i in range(3):
        engine.add(i, PROMPT, ANSWER)
    other = engine.add(3, [7] * 20, ANSWER)
    engine.step()
    engine.step()
    assert other.first_scheduled is not None
    drain(engine)


def test_they_go_on_when_the_one_that_computes_is_gone() -> None:
    engine = engine_with(max_chunk_tokens=16)
    first, second, third = (engine.add(i, PROMPT, ANSWER) for i in range(3))
    engine.step()
    engine.step()
    assert (first.planned, second.planned) == (32, 0)
    engine.finish(first.id)
    engine.step()
    assert (second.planned, third.planned) == (48, 0)  # 32 of them found in the cache
    engine.preempt(second.id)
    drain(engine)
    assert second.finish_reason == third.finish_reason == "length"


def test_who_has_waited_too_long_waits_for_nobody_s_prefix() -> None:
    engine = engine_with(max_chunk_tokens=1, starvation_turns=5)
    first, second = (engine.add(i, PROMPT, ANSWER) for i in range(2))
    for _ in range(10):
        engine.step()
    assert first.in_prefill
    assert second.first_scheduled is not None
    drain(engine)


def test_no_more_are_set_aside_than_could_run_and_the_prompt_is_still_computed_once() -> None:
    records: list[dict[str, Any]] = []
    engine = engine_with(records, max_num_seqs=4, max_chunk_tokens=8)
    for i in range(200):
        engine.add(i, PROMPT, ANSWER)
    while engine.has_work:
        engine.step()
        assert engine.scheduler.waiting.num_aside <= 4
    assert sum(c["tokens"] for r in records for c in r["chunks"] if c["phase"] == "prefill") == 100 + 199 * 4


def test_a_prefix_cache_that_is_off_is_not_asked() -> None:
    for caching, figures in ((True, (200, 96)), (False, (0, 0))):
        engine = engine_with(enable_prefix_caching=caching)
        for i in range(2):
            engine.add(i, PROMPT, ANSWER)
        drain(engine)
        counters = engine.scheduler.counters
        assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == figures
