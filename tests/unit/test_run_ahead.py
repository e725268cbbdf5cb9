"""Running ahead in virtual time changes nothing but the time that the simulation takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import ModelSpec, SchedulerConfig
from foretell.core import ahead
from foretell.core.ahead import Stretch
from foretell.core.engine import Engine
from foretell.core.messages import Batch, Chunk
from foretell.core.params import SamplingParams
from foretell.cost import FloorCost, Hardware
from foretell.executor.virtual import VIRTUAL_EOS, LinearCost, VirtualExecutor
from tests.unit.simulated import related_prompts

COST = LinearCost(0.004, 0.0003, 1e-6)


class Recording(VirtualExecutor):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.chunks: list[Any] = []

    def submit(self, batch: Batch) -> None:
        self.chunks.append([(c.request_id, c.start, c.length, c.new_block_ids, c.sample) for c in batch.chunks])
        super().submit(batch)


@dataclass
class Run:
    """Batches in order, token times by request, and what is left of the engine."""

    chunks: list[Any]
    times: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    stretches: int = 0
    state: Any = None


def expand(stretch: Stretch, groups: int) -> list[Any]:
    """The batches of a stretch, one by one."""
    new = {(step, request_id): blocks for step, request_id, blocks in stretch.new_blocks}
    none = ((),) * groups
    return [
        [
            (i, start + step, 1, new.get((step, i), none), True)
            for i, start in zip(stretch.request_ids, stretch.starts, strict=True)
        ]
        for step in range(len(stretch.finished))
    ]


def simulate(setup: dict[str, Any], *, run_ahead: bool) -> Run:
    depth, chain = setup.get("depth", (1, 0))
    executor = Recording(COST, setup["num_blocks"], output_lengths=setup["lengths"], depth=depth, chain=chain)
    engine = Engine(setup["config"], executor, setup.get("windows", (None,)))
    run = Run(executor.chunks)
    arrivals = sorted(setup["arrivals"].items(), key=lambda item: (item[1], item[0]))
    requests = {}
    while arrivals or engine.has_work:
        while arrivals and arrivals[0][1] <= executor.now:
            request_id, arrival = arrivals.pop(0)
            params = SamplingParams(temperature=0, stop_token_ids=(), eos_token_ids=())
            request = requests[request_id] = engine.add(
                request_id, setup["prompts"][request_id], params, arrival=arrival,
                priority=setup.get("priorities", {}).get(request_id, 0),
            )  # fmt: skip
            request.stop_ids = frozenset({VIRTUAL_EOS})  # no token id of a client's
            run.times[request_id] = []
        until = arrivals[0][1] if arrivals else None
        stretch = engine.run_ahead(until) if run_ahead else None
        if stretch is not None:
            run.stretches += 1
            run.chunks += expand(stretch, len(setup["num_blocks"]))
            for request_id in stretch.request_ids:
                run.times[request_id] += stretch.finished
            continue
        for output in engine.step(until):
            if output.token_id is not None:
                run.times[output.request_id].append(executor.now)
    run.tokens = {i: request.tokens for i, request in requests.items()}
    scheduler = engine.scheduler
    run.state = (
        scheduler.turn, scheduler.num_batches, scheduler.counters,
        [(dict(p.cached), list(p.free), p.hash_of) for p in scheduler.blocks.pools],
    )  # fmt: skip
    return run


@st.composite
def setups(draw: Any) -> dict[str, Any]:
    rng = random.Random(draw(st.integers(0, 10_000)))
    count, size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 4, 16]))
    longest = 120
    prompts = related_prompts(rng, count, longest)
    spare = draw(st.integers(0, 40))
    config = SchedulerConfig(
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 12])),
        max_num_batched_tokens=draw(st.sampled_from([12, 16, 64])),
        max_model_len=longest,
        block_size=size,
        policy=draw(st.sampled_from(["prefill-first", "decode-first", "mixed"])),
        enable_prefix_caching=draw(st.booleans()),
        starvation_turns=draw(st.sampled_from([3, 64])),
        admission_batch=draw(st.sampled_from([1, 1, 3])),
    )
    windows = draw(st.sampled_from([(None,), (None,), (None, 8), (None, 20, 33), (20,)]))
    return {
        "config": config,
        "windows": windows,
        "num_blocks": tuple(-(-min(longest, (w or longest) + size) // size) + 1 + spare for w in windows),
        "depth": draw(st.sampled_from([(1, 0), (2, 1)])),
        "prompts": prompts,
        "priorities": {i: rng.choice((0, 0, 1)) for i in prompts},
        "lengths": {i: rng.randrange(1, 80) for i in prompts},
        "arrivals": {i: rng.random() * draw(st.sampled_from([0.0, 0.3, 3.0])) for i in prompts},
    }


@settings(max_examples=120, deadline=None)
@given(setups())
def test_the_same_batches_blocks_tokens_and_times(setup: dict[str, Any]) -> None:
    single, many = simulate(setup, run_ahead=False), simulate(setup, run_ahead=True)
    assert many.chunks == single.chunks
    assert many.tokens == single.tokens
    assert many.state == single.state
    assert many.times.keys() == single.times.keys()
    for request_id, times in single.times.items():
        assert many.times[request_id] == pytest.approx(times, rel=1e-9)


def test_a_lone_request_is_run_in_few_stretches() -> None:
    setup = {
        "config": SchedulerConfig(max_model_len=4096),
        "num_blocks": (300,),
        "prompts": {0: [1] * 10},
        "lengths": {0: 3000},
        "arrivals": {0: 0.0},
    }
    run = simulate(setup, run_ahead=True)
    assert run.stretches == 1
    assert len(run.times[0]) == 3000


def test_a_stretch_taken_too_long_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison above would not see if the bound on blocks were right by accident."""
    setup = {
        "config": SchedulerConfig(max_model_len=64, block_size=4, max_num_seqs=4),
        "num_blocks": (20,),
        "prompts": {i: [i] * 4 for i in range(4)},
        "lengths": dict.fromkeys(range(4), 50),
        "arrivals": dict.fromkeys(range(4), 0.0),
    }
    assert simulate(setup, run_ahead=True).chunks == simulate(setup, run_ahead=False).chunks
    monkeypatch.setattr(ahead, "most_steps", lambda scheduler, requests: 40)
    with pytest.raises(RuntimeError, match="ran out of blocks"):
        simulate(setup, run_ahead=True)


@pytest.mark.parametrize("windows", [(None, None), (None, 32)])
def test_costs_of_consecutive_steps_are_those_of_single_ones(windows: tuple[int | None, ...]) -> None:
    spec = ModelSpec("llama", 2, 64, 128, 4, 2, 16, 100, 512, windows)
    hardware = Hardware(2, 3e10, {"float32": 1e11})
    positions = [3, 100, 57]
    for cost in (COST, FloorCost(spec, hardware, "float32")):
        steps = cost.decode_seconds(positions)
        for step in range(60):
            chunks = [Chunk(i, position + step, 1, (), True) for i, position in enumerate(positions)]
            assert next(steps) == pytest.approx(cost(Batch(0, chunks)), rel=1e-12)
