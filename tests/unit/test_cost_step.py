"""The cost model of a step: what was measured comes out again, what lies beyond is said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.benchmark.simulate import simulate
from foretell.config import ModelSpec, RopeSpec, SchedulerConfig
from foretell.core.messages import Batch, Chunk
from foretell.cost.floor import ChunkShape
from foretell.cost.grid import BeyondProfileError, Curve, Surface
from foretell.cost.profile import Profile, attended
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from foretell.trace.workloads import Lengths, random_workload

SPEC = ModelSpec(
    "llama", 4, 64, 128, 4, 2, 16, 100, 8192, (None,) * 4, rope=RopeSpec(1e4, 16, freq_divisors=(1.0, 2.0))
)
LINEAR, HEAD, HOST, PAIR = 2e-4, 1e-4, 5e-5, 3e-8  # seconds: per token, per row, per sequence, per query-key pair


def ideal(spec: ModelSpec = SPEC) -> Profile:
    """Of a machine on which everything is proportional to its size, so that truth is known at every point."""
    sizes = (1, 4, 16, 64)
    decode = [(float(n), float(keys), PAIR) for n in sizes for keys in (64, 1024, 8192)]
    prefill = [(float(q), float(q + s), PAIR) for q in (32, 512, 2048) for s in (0, 2048)]
    return Profile(
        model="ideal", spec=spec, dtype="float32", weight_format="float32", kernels="none", hardware="paper",
        created="2026-01-01T00:00:00+00:00", versions={}, block_size=16,
        linear=Curve.of([(float(n), LINEAR * n) for n in (1, 8, 64, 2048)]),
        head=Curve.of([(float(n), HEAD * n) for n in (1, 64)]),
        host=Curve.of([(1.0, HOST), (64.0, 64 * HOST)]),
        decode_rate=Surface.of(decode), prefill_rate=Surface.of(prefill),
        low=0.9, high=1.2, median_error=0.05, held_out=[],
    )  # fmt: skip


shapes = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(1, 200), st.booleans()).map(lambda t: ChunkShape(*t)),
    min_size=1,
    max_size=10,
)


@given(shapes)
def test_on_an_ideal_machine_every_step_is_predicted_exactly(chunks: list[ChunkShape]) -> None:
    estimate = StepCost(ideal()).estimate(chunks)
    tokens, sampled = sum(c.length for c in chunks), sum(c.sample for c in chunks)
    pairs = sum(c.length * c.start + c.length * (c.length + 1) / 2 for c in chunks)
    assert estimate.linear == pytest.approx(LINEAR * tokens)
    assert estimate.head == pytest.approx(HEAD * sampled)
    assert estimate.attention == pytest.approx(PAIR * pairs)
    assert estimate.host == pytest.approx(HOST * len(chunks))
    assert estimate.low == pytest.approx(0.9 * estimate.seconds)
    assert estimate.high == pytest.approx(1.2 * estimate.seconds)


def test_beyond_the_grid_the_interval_widens_and_is_counted() -> None:
    cost = StepCost(ideal())
    far = cost.estimate([ChunkShape(4 * 8192 - 1, 1)])
    assert far.source == "beyond the grid"
    assert far.high - far.seconds == pytest.approx((2 + 2) * 0.2 * far.seconds)
    cost(Batch(0, [Chunk(0, 4 * 8192 - 1, 1, (), True)]))
    cost(Batch(1, [Chunk(0, 100, 1, (), True)]))
    assert (cost.steps, cost.beyond) == (2, 1)
    with pytest.raises(BeyondProfileError, match="8 times"):
        cost(Batch(2, [Chunk(0, 100_000, 1, (), True)]))
    with pytest.raises(BeyondProfileError, match="8 times"):
        cost.estimate([ChunkShape(100_000, 1)])


@pytest.mark.parametrize("windows", [(None,) * 4, (None, 32, 32, 32)])
def test_consecutive_decodes_cost_what_single_steps_do(windows: tuple[int | None, ...]) -> None:
    cost = StepCost(ideal(replace(SPEC, windows=windows)))
    positions = [5, 700, 31]
    steps = cost.decode_seconds(positions)
    for step in range(80):
        single = cost.estimate([ChunkShape(p + step, 1) for p in positions]).seconds
        assert next(steps) == pytest.approx(single, rel=1e-12)


def test_layers_with_a_window_look_back_no_further() -> None:
    groups = replace(SPEC, windows=(None, 8, 8, 8)).kv_groups
    assert attended(groups, 4, 99, 1) == (100 + 3 * 8) / 4


def test_a_curve_goes_through_its_points_and_on_with_its_last_slope() -> None:
    curve = Curve.of([(4.0, 8.0), (1.0, 1.0), (2.0, 4.0)])
    assert [curve(x) for x in (1, 2, 3, 4, 6)] == [1, 4, 6, 8, 12]
    assert curve(0) == 1.0  # no less than the least that was measured
    assert Curve.of([(1.0, 5.0)])(100) == 5.0


@given(st.floats(1, 64), st.floats(1, 8192))
def test_a_surface_stays_between_the_points_around(first: float, second: float) -> None:
    points = [(float(n), float(k), n + math.log2(k)) for n in (1, 8, 64) for k in (1, 64, 8192)]
    surface = Surface.of(points)
    assert min(p[2] for p in points) <= surface(first, second) <= max(p[2] for p in points)
    for n, k, rate in points:
        assert surface(n, k) == pytest.approx(rate)
    assert surface.holds(first, second)
    assert not surface.holds(65, second)


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    profile = ideal(replace(SPEC, windows=(None, 8, None, 8)))
    profile.save(tmp_path / "deep" / "p.json")
    assert Profile.load(tmp_path / "deep" / "p.json") == profile


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 2}', '{"version": 2, "spec": 5}'])
def test_a_bad_profile_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match="calibrate") as caught:
        Profile.load(tmp_path / "p.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"not there|No such file"):
        Profile.load(tmp_path / "absent.json")


def test_the_simulation_takes_as_long_as_its_steps() -> None:
    """Alone, a request takes its prefill and its decodes, one after the other."""
    cost: Any = StepCost(ideal())
    workload = random_workload(1, Lengths.parse("100"), Lengths.parse("50"), 0)
    run = simulate(workload, 100, SchedulerConfig(max_model_len=1024), (100,), [None], cost)
    expected = cost.estimate([ChunkShape(0, 100)]).seconds
    expected += sum(cost.estimate([ChunkShape(position, 1)]).seconds for position in range(100, 149))
    assert run.seconds == pytest.approx(expected, rel=1e-9)
    assert run.steps == 50
