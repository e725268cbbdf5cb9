"""The planner against brute force: on tiny synthetic machines everything can be simulated, so the truth is known."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from foretell.benchmark.simulate import simulate
from foretell.cli.app import app
from foretell.cli.options import Engine
from foretell.config import ModelSpec, SchedulerConfig
from foretell.core.messages import Batch, Chunk
from foretell.cost.grid import Curve, Surface
from foretell.cost.links import Link
from foretell.cost.named import own_path
from foretell.cost.profile import Profile
from foretell.cost.ranks import StageCost, consecutive_decodes, stage_profile, stage_traffic
from foretell.cost.step import StepCost
from foretell.errors import ConfigError, ForetellError
from foretell.executor.staged import StagedExecutor
from foretell.executor.virtual import VirtualExecutor, synthetic_run, synthetic_token
from foretell.model.load import spec_for
from foretell.options import EngineOptions
from foretell.parallel.layout import make_layout, possible_layouts
from foretell.parallel.volume import volume
from foretell.plan import plan as plans
from foretell.plan import start
from foretell.plan.command import default_path
from foretell.plan.evaluate import TERMS, evaluate
from foretell.plan.fleet import Prompts, serve
from foretell.plan.goals import Goal, measured
from foretell.plan.machine import Machine, parse_devices
from foretell.plan.memory import Ledger, ledger
from foretell.plan.problem import Problem
from foretell.plan.prune import bounds
from foretell.plan.rank import pareto, ranking
from foretell.plan.search import Found, search
from foretell.plan.space import Candidate, Choices, candidates
from foretell.plan.start import start_of
from foretell.plan.words import report
from foretell.plan.workers import Workers
from foretell.store import resolve
from foretell.trace.arrivals import arrival_times
from foretell.trace.workloads import TraceRequest, Workload

SPEC = ModelSpec("llama", 4, 64, 128, 4, 2, 16, 100, 4096, (None,) * 4)
LINK = Link("a wire", 2e-4, 1e9)
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
CANDIDATE = Candidate("bfloat16", 1, 1, 1, "mixed", 8, 256, 0, 0.9, True)


def profile(*, weights: float = 4e-3, token: float = 5e-5, key: float = 2e-7, host: float = 3e-4) -> Profile:
    """Of a machine that reads all weights in ``weights`` seconds and needs ``token`` for a token's operations."""
    return Profile(
        model="paper", spec=SPEC, dtype="bfloat16", weight_format="bfloat16", kernels="none", hardware="paper",
        created="2026-01-01T00:00:00+00:00", versions={}, block_size=16,
        linear=Curve.of([(n, max(weights, n * token)) for n in (1.0, weights / token, 4096.0)]),
        head=Curve.of([(1.0, 1e-4), (512.0, 1e-4)]), host=Curve.of([(1.0, host)]),
        decode_rate=Surface.of([(1.0, 64.0, key), (512.0, 8192.0, key)]),
        prefill_rate=Surface.of([(2.0, 64.0, key / 4), (4096.0, 8192.0, key / 4)]),
        low=0.9, high=1.2, median_error=0.05, held_out=[],
    )  # fmt: skip


def problem(
    *,
    requests: int = 24,
    rate: float = 40.0,
    goal: str | None = "ttft_p90=0.3,tpot_p90=12ms",
    objective: str = "goodput",
    memory: int = 2 << 30,
    seed: int = 0,
    shared: bool = False,
    count: int = 2,
    **of_profile: float,
) -> Problem:
    rng = random.Random(seed)
    arrivals = arrival_times(requests, rate, seed=seed)
    asked = tuple(
        TraceRequest(rng.randrange(20, 400), rng.randrange(1, 60), at, block_hashes=(7, 8) if shared else (),
                     block_tokens=16)
        for at in arrivals
    )  # fmt: skip
    machine = Machine("h100", count, memory, LINK, 1e-4)
    prompts = Prompts(Workload("random", "tiny", asked), SPEC.vocab_size)
    return Problem(
        SPEC, machine, Goal.parse(goal, objective), prompts, {"bfloat16": profile(**of_profile)},
        {"bfloat16": 10 << 20},
    )  # fmt: skip


CHOICES = Choices(
    ("bfloat16",),
    ((1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 2, 1)),
    max_num_seqs=(16, 4),
    max_num_batched_tokens=(512, 64),
    chunk_parts=(1, 4),
    kv_shares=(0.9,),
    prefix_caching=(True,),
)


def points(found: Found) -> set[tuple[float, ...]]:
    """The Pareto set by its values: of equal ones it does not matter which stays."""
    outcomes = ((found.outcomes[i], found.candidates[i].ranks) for i in pareto(found))
    return {(o.goodput, *o.latencies, devices) for o, devices in outcomes}


@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(
    st.integers(0, 10_000),
    st.sampled_from([5.0, 40.0, 400.0]),
    st.sampled_from(["goodput", "latency", "cost"]),
    st.sampled_from([None, "ttft_p90=0.3,tpot_p90=12ms", "tpot_p99=5ms"]),
    st.booleans(),
)
def test_pruning_changes_neither_the_winner_nor_the_pareto_set(
    seed: int, rate: float, objective: str, goal: str | None, shared: bool
) -> None:
    asked = problem(requests=8, rate=rate, goal=goal, objective=objective, seed=seed, shared=shared)
    space = candidates(CHOICES)
    all_of_them, few = search(asked, space, exhaustive=True), search(asked, space)
    assert len(all_of_them.outcomes) == len(space)
    best, chosen = ranking(asked.goal, all_of_them)[0], ranking(asked.goal, few)[0]
    truth, found = all_of_them.outcomes[best], all_of_them.outcomes[chosen]
    assert (found.goodput, found.latencies) == (truth.goodput, truth.latencies)
    assert all_of_them.candidates[best].ranks == all_of_them.candidates[chosen].ranks
    assert points(few) == points(all_of_them)
    for pruned in few.pruned.values():
        if pruned.kind == "the same run":
            assert pruned.like is not None
            assert all_of_them.outcomes[pruned.index].latencies == all_of_them.outcomes[pruned.like].latencies


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.integers(0, 10_000), st.sampled_from([5.0, 100.0]), st.booleans(), st.sampled_from(CHOICES.layouts))
def test_no_simulation_is_better_than_its_bounds(
    seed: int, rate: float, shared: bool, layout: tuple[int, int, int]
) -> None:
    asked = problem(requests=10, rate=rate, seed=seed, shared=shared)
    tp, pp, replicas = layout
    for policy in ("mixed", "prefill-first", "decode-first"):
        one = replace(CANDIDATE, tp=tp, pp=pp, replicas=replicas, policy=policy)
        held = ledger(asked, one)
        assert isinstance(held, Ledger)
        outcome, best = evaluate(asked, one, held.num_blocks), bounds(asked, one)
        assert outcome.goodput <= best.goodput * (1 + 1e-9)
        for value, least in zip(outcome.latencies, best.latencies, strict=True):
            assert value >= least * (1 - 1e-9)


def test_what_cannot_be_as_good_is_not_simulated() -> None:
    """Weights that take ten times as long to read, and a cache that nothing can be found in."""
    asked = problem(rate=2.0)
    slow = replace(profile(weights=4e-2, token=5e-4), weight_format="float32")
    asked = replace(
        asked,
        profiles={**asked.profiles, "float32": slow},
        weight_bytes={**asked.weight_bytes, "float32": 20 << 20},
    )
    found = search(asked, [CANDIDATE, replace(CANDIDATE, weights="float32")])
    assert list(found.outcomes) == [0]
    assert found.pruned[1].kind == "worse in every way"
    assert "goodput at most" in found.pruned[1].reason


def test_of_equal_runs_the_plainest_wins() -> None:
    asked = problem(rate=2.0, goal=None)
    odd = replace(CANDIDATE, max_num_seqs=16)
    found = search(asked, [CANDIDATE, odd])
    assert found.pruned[1].like == 0
    found.outcomes = {1: found.outcomes[0]}  # as if the odd one had been looked at first
    found.pruned = {0: replace(found.pruned[1], index=0, like=1)}
    made = plans.conclude(asked, found, model="paper")
    assert made.winner == 0
    assert made.engine["max_num_seqs"] == CANDIDATE.max_num_seqs
    assert [(p.index, p.like) for p in found.pruned.values()] == [(1, 0)]


def test_a_part_of_the_space_has_something_of_everything() -> None:
    asked = problem(requests=3)
    found = search(asked, candidates(CHOICES), most=16)
    looked_at = [found.candidates[i] for i in found.outcomes]
    assert len(looked_at) == 16
    assert {one.policy for one in looked_at} == set(CHOICES.policies)
    assert {one.layout for one in looked_at} == set(CHOICES.layouts)
    left = [pruned for pruned in found.pruned.values() if pruned.kind == "not simulated"]
    assert all("as many as were asked for" in pruned.reason for pruned in left)
    assert found.settled == len(found.candidates)


def test_what_would_be_the_same_run_is_not_simulated_again() -> None:
    asked = problem(rate=2.0)
    space = [CANDIDATE, replace(CANDIDATE, max_num_seqs=6), replace(CANDIDATE, enable_prefix_caching=False)]
    space.append(replace(CANDIDATE, max_num_seqs=1))
    found = search(asked, space)
    assert sorted(found.outcomes) == [0, 3]
    assert "ran at once" in found.pruned[1].reason
    assert "begin alike" in found.pruned[2].reason


@settings(max_examples=10, deadline=None, phases=[Phase.generate])
@given(st.lists(st.integers(12 << 20, 2 << 30), min_size=2, max_size=2))
def test_more_memory_never_leaves_fewer_options(sizes: list[int]) -> None:
    fitting = []
    for size in sorted(sizes):
        asked = problem(requests=3, memory=(1 << 30) + size)
        fitting.append({i for i, one in enumerate(candidates(CHOICES)) if isinstance(ledger(asked, one), Ledger)})
    assert fitting[0] <= fitting[1]


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    found = search(problem(memory=700 << 20, requests=3), candidates(CHOICES))
    assert not found.outcomes
    assert {pruned.kind for pruned in found.pruned.values()} == {"too large"}
    assert all("GiB" in pruned.reason for pruned in found.pruned.values())


def test_layouts_that_the_model_or_the_engine_does_not_allow_are_named() -> None:
    space = [replace(CANDIDATE, tp=3), replace(CANDIDATE, replicas=5), CANDIDATE]
    found = search(problem(requests=3, count=4), space)
    assert "heads" in found.pruned[0].reason
    assert "more than 4 devices" in found.pruned[1].reason
    assert list(found.outcomes) == [2]


@pytest.mark.parametrize(
    ("expected", "of_profile", "rate"),
    [
        ("weights", {"weights": 2e-2, "token": 1e-6, "key": 1e-10, "host": 1e-6}, 1.0),
        ("compute", {"weights": 1e-6, "token": 1e-3, "key": 1e-10, "host": 1e-6}, 0.3),
        ("KV reads", {"weights": 1e-6, "token": 1e-8, "key": 1e-4, "host": 1e-6}, 1.0),
        ("CPU", {"weights": 1e-6, "token": 1e-8, "key": 1e-10, "host": 1e-2}, 1.0),
        ("queue", {"weights": 2e-2, "token": 1e-3, "key": 1e-9, "host": 1e-6}, 1000.0),
    ],
)
def test_the_bound_is_what_the_machine_was_made_slow_at(
    expected: str, of_profile: dict[str, float], rate: float
) -> None:
    asked = problem(rate=rate, **of_profile)
    outcome = evaluate(asked, replace(CANDIDATE, max_num_seqs=4), (4000,))
    assert outcome.bound == expected
    assert outcome.terms[outcome.bound] == max(outcome.terms.values())
    assert sum(outcome.terms.values()) == pytest.approx(1)


def test_slow_links_are_told_from_slow_devices() -> None:
    asked = problem(rate=1.0, weights=1e-3, host=1e-6)
    slow = replace(asked, machine=replace(asked.machine, link=Link("a string", 1e-2, 1e9)))
    assert evaluate(slow, replace(CANDIDATE, tp=2), (4000,)).bound == "collectives"
    assert evaluate(asked, CANDIDATE, (4000,)).terms["collectives"] == 0


# -- the fleet --------------------------------------------------------------------------------------------------


def test_one_replica_is_served_as_simulate_serves() -> None:
    asked = problem(requests=30, shared=True)
    config, cost = asked.config(CANDIDATE), StepCost(profile())
    workload = asked.prompts.workload
    want = simulate(workload, SPEC.vocab_size, config, (300,), [None], cost)
    got = serve(asked.prompts, config, [None], [VirtualExecutor(StepCost(profile()), (300,))])
    assert got.steps == want.steps
    for ours, theirs in zip(got.requests, want.requests, strict=True):
        assert ours.token_times[0] == pytest.approx(theirs.token_times[0], rel=1e-9)
        assert ours.token_times[-1] == pytest.approx(theirs.token_times[-1], rel=1e-9)
        assert ours.num_tokens == theirs.num_tokens
        assert ours.cached_tokens == theirs.cached_tokens


def test_replicas_share_the_load_and_send_equal_beginnings_to_one() -> None:
    same = tuple(TraceRequest(160, 8, 1.0 * i, block_hashes=(i % 2,), block_tokens=160) for i in range(8))
    prompts = Prompts(Workload("turns", "two conversations", same), SPEC.vocab_size)
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512)
    run = serve(prompts, config, [None], [VirtualExecutor(StepCost(profile()), (200,)) for _ in range(2)])
    assert [request.cached_tokens for request in run.requests] == [0, 0] + [144] * 6
    at_once = tuple(replace(request, arrival_seconds=0.0, block_hashes=()) for request in same)
    prompts = Prompts(Workload("burst", "all at once", at_once), SPEC.vocab_size)
    two = serve(prompts, config, [None], [VirtualExecutor(StepCost(profile()), (200,)) for _ in range(2)])
    one = serve(prompts, config, [None], [VirtualExecutor(StepCost(profile()), (200,))])
    assert two.extent.peak_running == 4
    assert two.seconds < 0.7 * one.seconds


def test_runs_of_synthetic_tokens_are_the_single_ones() -> None:
    for request_id, first, end in ((0, 0, 5), (7, 3, 900), (123, 49_990, 50_010), (1, 46_990, 47_100)):
        assert synthetic_run(request_id, first, end) == [synthetic_token(request_id, i) for i in range(first, end)]
    assert synthetic_token(3, 4) == (3 * 1_000_003 + 4) * 2_654_435_761 % 50_000


# -- ranks and stages -------------------------------------------------------------------------------------------


def test_stages_overlap_and_each_does_its_batches_in_turn() -> None:
    stages = StagedExecutor([lambda batch: 1.0, lambda batch: 3.0], (10,))
    for number in range(3):
        stages.submit(Batch(number, [Chunk(number, 0, 4, ((),), False)]))
    ends = [result.finished for result in (stages.wait(None) for _ in range(3)) if result is not None]
    assert ends == [4.0, 7.0, 10.0]  # the second stage is the narrow one: 1 + 3, then 3 each


@pytest.mark.parametrize(("tp", "pp"), possible_layouts(SPEC, 8))
def test_what_stages_say_adds_up_to_the_volume_of_the_step(tp: int, pp: int) -> None:
    spec = replace(SPEC, qk_norm="full", num_heads=8, num_kv_heads=8)
    layout = make_layout(spec, tp, pp)
    told = [stage_traffic(spec, layout, stage, 2) for stage in range(pp)]
    whole = volume(spec, layout, tokens=10, sampled=3, element_bytes=2)
    assert sum(t.sums + t.norm_sums for t in told) == whole.sums
    assert sum(t.sums * t.sum_bytes_per_token * 10 + t.norm_sums * 40 for t in told) == whole.sum_bytes
    assert sum(t.gather_bytes_per_row * 3 for t in told) == whole.gather_bytes
    assert sum(t.send_bytes_per_token * 10 for t in told) * tp == whole.send_bytes


def test_the_shards_of_a_layout_take_their_part_of_the_whole() -> None:
    batch = Batch(0, [Chunk(i, 300, 1, ((),), True) for i in range(8)])
    free = Link("nothing", 0.0, 1e30)
    whole = profile(host=0.0)

    def seconds(tp: int, pp: int, layer_seconds: float = 0.0) -> list[float]:
        layout = make_layout(SPEC, tp, pp)
        costs = [
            StageCost(
                stage_profile(whole, layout, s, layer_seconds=layer_seconds), layout, s, free,
                stage_traffic(SPEC, layout, s, 2),
            )
            for s in range(pp)
        ]  # fmt: skip
        return [cost(batch) for cost in costs]

    one = seconds(1, 1)[0]
    assert seconds(2, 1)[0] == pytest.approx(one / 2)
    assert sum(seconds(1, 4)) == pytest.approx(one)
    launches = 4 * 5e-4  # of four layers: not shared by the ranks of a layer
    assert seconds(2, 1, 5e-4)[0] == pytest.approx((one - launches) / 2 + launches)


@pytest.mark.parametrize("windows", [(None,) * 4, (None, 64, 64, 64)])
@pytest.mark.parametrize("count", [1, 3, 8, 20, 600])
def test_consecutive_decodes_take_what_the_cost_model_says(windows: tuple[int | None, ...], count: int) -> None:
    """Over the ends of pieces, past the end of what was measured, and with a rate that is not monotone."""
    rng = random.Random(count)
    rates = Surface.of([(n, k, rng.random()) for n in (1.0, 4.0, 64.0, 512.0) for k in (16.0, 64.0, 100.0, 190.0)])
    bent = replace(profile(), spec=replace(SPEC, windows=windows), decode_rate=rates, overlaps=count == 3)
    fast, slow = StepCost(bent), StepCost(bent)
    positions = [rng.randrange(5, 60) for _ in range(count)]
    ours, theirs = consecutive_decodes(fast, positions), slow.decode_seconds(positions)
    for _ in range(300):
        assert next(ours) == pytest.approx(next(theirs), rel=1e-9)
        assert (fast.steps, fast.beyond) == (slow.steps, slow.beyond)
    assert slow.beyond > 0 or windows[1]


def test_a_cache_that_finds_nothing_is_left_out_unless_requests_come_back_to_it() -> None:
    """Both ways of simulating agree where nothing is preempted; where it is, the cache must be there."""
    asked = problem(requests=16, rate=200.0)
    for blocks in (400, 34):
        without = evaluate(asked, replace(CANDIDATE, enable_prefix_caching=False), (blocks,))
        cached = evaluate(asked, CANDIDATE, (blocks,))
        real = serve(
            asked.prompts, asked.config(CANDIDATE), [None],
            [VirtualExecutor(asked.stage_costs(CANDIDATE)[0], (blocks,), depth=2, chain=1)],
        )  # fmt: skip
        assert cached.latencies == measured(real.requests, asked.goal)
        assert cached.extent.preempted == (blocks == 34)
        assert (without.latencies == cached.latencies) == (blocks == 400)


# -- goals, machines, files ------------------------------------------------------------------------------------


def test_goals_are_read_in_seconds_and_milliseconds() -> None:
    goal = Goal.parse("ttft_p99=0.5, tpot_p90 = 30ms,e2e=10s")
    assert [(limit.name, limit.seconds) for limit in goal.limits] == [
        ("ttft_p99", 0.5), ("tpot_p90", 0.03), ("e2e_p99", 10.0)
    ]  # fmt: skip
    assert goal.objectives.tpot_seconds == 0.03
    for wrong in ("ttft", "ttft_p99=0", "ttft=1,ttft_p50=2", "speed=3", "ttft_p100=1"):
        with pytest.raises(ConfigError, match="no list of objectives"):
            Goal.parse(wrong)
    with pytest.raises(ConfigError, match="unknown objective"):
        Goal.parse(None, "beauty")


def test_devices_are_read_and_unknown_ones_refused() -> None:
    assert parse_devices("2xH200").count == 2
    assert parse_devices("cpu").is_cpu
    for wrong in ("2xcpu", "0xH200", "abacus", "", "2x", "H200x2x"):
        with pytest.raises(ConfigError, match="no device to plan for"):
            parse_devices(wrong)


def test_a_plan_says_what_starts_it_and_survives_its_file(tmp_path: Path) -> None:
    asked = problem(requests=6)
    found = search(asked, candidates(CHOICES))
    made = plans.conclude(asked, found, model="paper", dtype="bfloat16")
    data: dict[str, Any] = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    plans.save(data, tmp_path / "plan.json")
    assert plans.load(tmp_path / "plan.json") == data
    assert set(data["engine"]) <= set(plans.ENGINE_FIELDS)
    assert data["winner"]["bound"] in TERMS
    low, value, high = (data["predicted"]["ttft_p90 s"][name] for name in ("low", "value", "high"))
    assert low <= value <= high
    assert low < high
    told = "\n".join(report(made))
    assert f"bound by {data['winner']['bound']}" in told
    assert "policy decode-first" in told


def test_a_plan_starts_the_engine_it_chose_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    asked = replace(problem(requests=3), machine=Machine("laptop", 1, 4 << 30, LINK))
    found = search(asked, [replace(CANDIDATE, replicas=2, policy="prefill-first", kv_share=0.3, max_chunk_tokens=64)])
    plans.save(plans.conclude(asked, found, model="tiny", dtype="float32").as_dict(), path)
    usual = Engine().options()
    start = start_of(str(path), None, usual, usual)
    options = EngineOptions(model=start.model, **start.options)
    assert (start.model, start.replicas) == ("tiny", 2)
    assert (options.policy, options.max_num_seqs, options.max_num_batched_tokens) == ("prefill-first", 8, 256)
    assert (options.max_chunk_tokens, options.dtype, options.device) == (64, "float32", "cpu")
    assert options.kv_cache_bytes == pytest.approx(0.3 * (4 << 30), rel=1e-6)
    with pytest.raises(ConfigError, match="decides on --policy"):
        start_of(str(path), None, {**usual, "policy": "decode-first"}, usual)
    with pytest.raises(ConfigError, match="decides on --replicas"):
        start_of(str(path), None, usual, usual, replicas=3)
    with pytest.raises(ConfigError, match="plan is for tiny"):
        start_of(str(path), "other", usual, usual)


def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    odd = '{"plan": 1, "model": "m", "engine": {"offline": true}}'
    for text, reason in (("[]", "no plan"), ("{", "no JSON"), ('{"plan": 1, "model": "m"}', "no winner"),
                         (odd, "which no plan may")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            plans.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        plans.load(tmp_path / "none.json")


def test_several_processes_find_what_one_finds() -> None:
    asked, space = problem(requests=10), candidates(CHOICES)[:12]
    one, two = (search(asked, space, processes=n, exhaustive=True) for n in (1, 2))
    assert one.outcomes == two.outcomes


def test_a_simulation_that_fails_or_dies_ends_the_search_with_its_reason() -> None:
    def fail(index: int) -> str:
        raise ValueError("no such thing")

    def result_of(run: Any) -> object:
        with Workers(run, 2) as workers:
            workers.submit(0)
            workers.submit(1)
            return workers.result()

    for run, reason in ((fail, "no such thing"), (lambda index: os._exit(1), "ended unexpectedly")):
        with pytest.raises(ForetellError, match=reason):
            result_of(run)


def test_the_command_plans_for_a_data_sheet_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path / "home"))
    folder, out, svg = tmp_path / "tiny", tmp_path / "plan.json", tmp_path / "plan.svg"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    told = ["plan", str(folder), "--devices", "2xL4", "--rate", "50", "--num-requests", "6", "--input-len", "20-90",
            "--output-len", "4-9", "--slo", "ttft_p99=1,tpot_p99=0.1", "--out", str(out), "--svg", str(svg),
            "--explain", "--most", "12"]  # fmt: skip
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    for words in (
        "winner: tp=1 pp=1 replicas=1",
        "bound by",
        "weights",
        "the same run",
    ):
        assert words in result.output
    assert svg.read_text().startswith("<svg")
    assert plans.load(out) == plans.load(tmp_path / "home" / "plans" / default_path(str(folder)).name)
    as_json = CliRunner().invoke(app, [*told, "--json"])
    assert json.loads(as_json.output)["winner"]["pp"] == 1
    refused = CliRunner().invoke(app, ["plan", str(folder), "--devices", "abacus"])
    assert refused.exit_code != 0


def test_auto_makes_a_plan_once_and_starts_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(start, "MOST", 4)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    usual = {**Engine().options(), "device": "cpu"}
    with pytest.raises(ConfigError, match="calibrate this model"):  # nothing that ships is like it
        start_of("auto", str(folder), usual, usual)
    replace(profile(), model="tiny", spec=spec_for(resolve(str(folder)))).save(own_path("tiny"))
    begun = start_of("auto", str(folder), usual, usual)
    EngineOptions(model=begun.model, **begun.options)
    assert begun.words.startswith("plan for random: 100 requests")
    assert "another machine" not in begun.words
    own_path("tiny").unlink()
    assert start_of("auto", str(folder), usual, usual) == begun  # it was kept: nothing is planned again
