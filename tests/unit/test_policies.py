"""What each policy is for, shown on one small workload: prompts arrive while others decode."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.errors import ConfigError
from foretell.executor.virtual import LinearCost, VirtualExecutor


def simulate(policy: Any, **options: Any) -> tuple[dict[int, list[float]], list[dict[str, Any]], Engine]:
    """Four requests decode, then eight long prompts arrive: token times by request, and step records."""
    config = SchedulerConfig(
        max_num_seqs=32, max_num_batched_tokens=128, policy=policy, **{"starvation_turns": 40, **options}
    )
    records: list[dict[str, Any]] = []
    engine = Engine(config, VirtualExecutor(LinearCost(), (4096,)), on_step=records.append)
    times: dict[int, list[float]] = {}

    def step() -> None:
        for out in engine.step():
            times.setdefault(out.request_id, []).append(engine.executor.now)

    for i in range(4):
        engine.add(i, [i] * 16, SamplingParams(max_tokens=60))
    for _ in range(5):
        step()
    for i in range(4, 12):
        engine.add(i, [i] * 300, SamplingParams(max_tokens=10))
    while engine.has_work:
        step()
    return times, records, engine


def worst_gap(times: dict[int, list[float]]) -> float:
    return max(b - a for i in range(4) for a, b in zip(times[i], times[i][1:], strict=False))


def mean_first(times: dict[int, list[float]]) -> float:
    return sum(times[i][0] for i in range(4, 12)) / 8


def test_the_trade_off_between_ttft_and_tpot() -> None:
    prefill_first, _, _ = simulate("prefill-first", starvation_turns=1000)
    decode_first, _, _ = simulate("decode-first", starvation_turns=1000)
    mixed, _, _ = simulate("mixed", starvation_turns=1000)
    assert mean_first(prefill_first) < mean_first(mixed) < mean_first(decode_first)
    assert worst_gap(decode_first) < worst_gap(prefill_first)
    assert worst_gap(mixed) < worst_gap(prefill_first)


def test_only_mixed_shares_a_batch_between_phases() -> None:
    for policy, shares in (("prefill-first", False), ("decode-first", False), ("mixed", True)):
        _, records, _ = simulate(policy)
        assert any(len({c["phase"] for c in r["chunks"]}) == 2 for r in records) is shares


@pytest.mark.parametrize("policy", ["prefill-first", "decode-first"])
def test_ageing_bounds_the_stall_of_the_disfavoured_phase(policy: str) -> None:
    _, records, _ = simulate(policy, starvation_turns=6)
    favoured = policy.removesuffix("-first")
    longest = run = 0
    for record in records:
        phase = record["chunks"][0]["phase"]
        waiting = record["waiting"] or record["running"] > len(record["chunks"])
        run = run + 1 if phase == favoured and waiting else 0
        longest = max(longest, run)
    assert longest <= 7, "the other phase was passed over longer than starvation_turns"


def test_switching_live_changes_the_order_and_loses_nothing() -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, policy="decode-first")
    engine = Engine(config, VirtualExecutor(LinearCost(), (512,)))
    for i in range(6):
        engine.add(i, [i] * 100, SamplingParams(max_tokens=20))
    done: dict[int, int] = {}
    names = ["prefill-first", "mixed", "decode-first"]
    turn = 0
    while engine.has_work:
        engine.set_policy(names[turn % 3])
        for out in engine.step():
            done[out.request_id] = done.get(out.request_id, 0) + 1
        turn += 1
    assert done == dict.fromkeys(range(6), 20)
    with pytest.raises(ConfigError, match="choose one of prefill-first, decode-first, mixed"):
        engine.set_policy("fastest")


def test_priority_goes_first_among_waiting_requests() -> None:
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64)
    engine = Engine(config, VirtualExecutor(LinearCost(), (64,)))
    for i, priority in enumerate([5, 0, -3, 0]):
        engine.add(i, [i] * 10, SamplingParams(max_tokens=1), priority=priority)
    order = []
    while engine.has_work:
        order += [out.request_id for out in engine.step()]
    assert order == [2, 1, 3, 0]


def test_preemption_is_recorded_with_its_reason() -> None:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, block_size=4, watermark=0.0)
    records: list[dict[str, Any]] = []
    engine = Engine(config, VirtualExecutor(LinearCost(), (12,)), on_step=records.append)
    for i in range(3):
        engine.add(i, [i] * 12, SamplingParams(max_tokens=20))
    while engine.has_work:
        engine.step()
    preempted = [p for r in records for p in r["preempted"]]
    assert preempted
    assert {p["reason"] for p in preempted} == {"kv_blocks_exhausted"}
    assert engine.scheduler.preemptions_by_reason == {"kv_blocks_exhausted": len(preempted)}
