"""The live check: steps as predicted leave the profile alone, a slower machine is followed, and said to be one."""

from __future__ import annotations

import json
import random

import pytest

from foretell.core.messages import Batch, Chunk, Result
from foretell.cost.refit import Scales
from foretell.cost.step import StepCost
from foretell.cost.watch import StepWatch
from tests.unit.test_cost_step import ideal


def batches(count: int, seed: int = 0) -> list[Batch]:
    rng = random.Random(seed)
    made = []
    for number in range(count):
        chunks = [Chunk(i, rng.randrange(1, 2000), 1, (), True) for i in range(rng.randrange(1, 20))]
        if number % 3 == 0:
            chunks.append(Chunk(99, 0, rng.randrange(2, 400), (), False))
        made.append(Batch(number, chunks))
    return made


def serve(watch: StepWatch, truth: Scales, steps: int, *, every_slow: int = 0) -> None:
    cost, now = StepCost(ideal()), 0.0
    for number, batch in enumerate(batches(steps)):
        seconds = truth.seconds(cost.estimate(batch.chunks))
        if every_slow and number % every_slow == 0:
            seconds *= 5
        watch(batch, Result(batch.id, [], now, now + seconds))
        now += seconds + 1e-4


def test_a_machine_as_measured_is_left_alone() -> None:
    watch = StepWatch(ideal())
    serve(watch, Scales(), 300)
    figures = watch.figures()
    assert figures["steps"] == 300
    assert figures["median_error"] == pytest.approx(0, abs=1e-9)
    assert figures["inside_interval"] == 1.0
    assert figures["predicted_seconds"] == pytest.approx(figures["measured_seconds"])
    assert not watch.wrong
    for scale in figures["scales"].values():
        assert scale == pytest.approx(1.0, abs=1e-6)
    json.dumps(figures)


def test_now_and_then_a_slow_step_teaches_nothing() -> None:
    watch = StepWatch(ideal())
    serve(watch, Scales(), 900, every_slow=20)
    assert not watch.wrong
    for scale in watch.scales.as_dict().values():
        assert scale == pytest.approx(1.0, abs=0.02)


def test_a_slower_machine_is_followed_slowly_and_told_of_once() -> None:
    told: list[StepWatch] = []
    watch = StepWatch(ideal(), told.append)
    truth = Scales(1.5, 1.5, 1.5, 1.5)
    serve(watch, truth, 128)
    first = watch.scales.linear
    assert 1.0 < first < 1.3  # a quarter of the way
    serve(watch, truth, 4000)
    assert told == [watch]
    assert watch.wrong
    assert "50 % longer" in watch.words()
    assert "\n" not in watch.words()
    batch = batches(1)[0]
    before, after = StepCost(ideal()).estimate(batch.chunks), StepCost(watch.refitted()).estimate(batch.chunks)
    assert after.device == pytest.approx(1.5 * before.device, rel=0.03)
    assert watch.figures()["median_error"] < 0.05


def test_steps_beyond_the_profile_are_counted_and_harm_nobody() -> None:
    watch = StepWatch(ideal())
    watch(Batch(0, [Chunk(0, 10**9, 1, (), True)]), Result(0, [], 0.0, 1.0))
    assert watch.figures()["beyond_profile"] == 1
    assert watch.figures()["steps"] == 0


def test_the_parts_are_the_estimates() -> None:
    cost = StepCost(ideal())
    for batch in batches(50):
        estimate, parts = cost.estimate(batch.chunks), cost.parts(batch.chunks)
        assert parts.kind == estimate.kind
        for name in ("linear", "head", "decode_attention", "prefill_attention", "device"):
            assert getattr(parts, name) == pytest.approx(getattr(estimate, name), rel=1e-12)


def test_quick_steps_are_looked_at_now_and_then() -> None:
    watch, batch = StepWatch(ideal()), Batch(0, [Chunk(0, 1, 1, (), True)])
    seconds = StepCost(ideal()).estimate(batch.chunks).device
    for _ in range(2000):
        watch(batch, Result(0, [], 0.0, seconds))
    assert seconds < 1e-3
    assert 128 <= watch.steps < 1000
