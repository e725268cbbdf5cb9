"""Profiles that nobody measured here: data sheets, other models', and those fitted to what steps took."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.config import ModelSpec, RopeSpec
from foretell.core.messages import Batch, Chunk
from foretell.cost import named
from foretell.cost.analytic import analytic_profile
from foretell.cost.devices import DEVICES
from foretell.cost.floor import ChunkShape, FloorCost
from foretell.cost.heldout import interval_of, judged
from foretell.cost.named import open_profile, own_path
from foretell.cost.profile import Profile
from foretell.cost.refit import Scales, fitted_scales
from foretell.cost.scaled import scaled_profile
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from tests.unit.test_cost_step import SPEC, ideal

LLAMA_8B = ModelSpec(
    "llama", 32, 4096, 14336, 32, 8, 128, 128_256, 131_072, (None,) * 32, rope=RopeSpec(5e5, 128)
)  # fmt: skip
QWEN_06B = ModelSpec(
    "qwen3", 28, 1024, 3072, 16, 8, 128, 151_936, 40_960, (None,) * 28, qk_norm="head", tied_embeddings=True,
    rope=RopeSpec(1e6, 128),
)  # fmt: skip
LLAMA_2_7B = ModelSpec(
    "llama", 32, 4096, 11008, 32, 32, 128, 32_000, 4096, (None,) * 32, rope=RopeSpec(1e4, 128)
)  # fmt: skip
# Milliseconds a decode step that this engine took on one H200: (model, sequences, keys of each in the middle)
ON_H200 = [(LLAMA_8B, 1, 256, 4.11), (LLAMA_8B, 32, 256, 4.63), (LLAMA_8B, 32, 8256, 15.7),
           (QWEN_06B, 1, 256, 0.79), (QWEN_06B, 32, 256, 1.27)]  # fmt: skip


@pytest.mark.parametrize(("spec", "count", "keys", "milliseconds"), ON_H200)
def test_the_data_sheet_of_an_h200_holds_what_one_took(
    spec: ModelSpec, count: int, keys: int, milliseconds: float
) -> None:
    estimate = StepCost(analytic_profile(spec, DEVICES["h200"], "bfloat16")).estimate([ChunkShape(keys, 1)] * count)
    assert estimate.low < milliseconds / 1e3 < estimate.high
    assert estimate.seconds == pytest.approx(milliseconds / 1e3, rel=0.35)
    assert estimate.source == "analytic floor"


@pytest.mark.parametrize(("spec", "count", "keys", "milliseconds"), [
    (LLAMA_8B, 1, 256, 3.84), (LLAMA_8B, 32, 256, 4.62),
])  # fmt: skip
def test_the_shipped_profile_of_an_h200_says_what_whole_runs_took(
    spec: ModelSpec, count: int, keys: int, milliseconds: float
) -> None:
    """Runs through the engine on that day and card; the profile was made from single steps."""
    profile = open_profile("h200", spec, model="llama-3.1-8b")
    assert profile.overlaps
    estimate = StepCost(profile).estimate([ChunkShape(keys, 1)] * count)
    assert estimate.seconds == pytest.approx(milliseconds / 1e3, rel=0.03)


@pytest.mark.parametrize(("count", "milliseconds"), [(1, 3.46), (32, 5.33)])
def test_another_model_is_foretold_from_a_profile_of_the_same_device(count: int, milliseconds: float) -> None:
    """Llama 2 7B on that H200, from the profile of Llama 3.1 8B: many KV heads in place of few, a smaller MLP."""
    profile = open_profile("h200", LLAMA_2_7B, model="llama-2-7b")
    assert profile.source == "scaled"
    assert "llama-3.1-8b" in profile.note
    estimate = StepCost(profile).estimate([ChunkShape(256, 1)] * count)
    assert estimate.low < milliseconds / 1e3 < estimate.high


def test_a_device_takes_the_longer_of_launching_computing_and_the_hosts_work() -> None:
    profile = replace(ideal(), overlaps=True, eager_seconds=1.0, graph_sizes=(1, 4, 8))
    cost = StepCost(profile)
    assert cost.estimate([ChunkShape(0, 64)]).seconds == 1.0
    three, four = (cost.estimate([ChunkShape(9, 1)] * n) for n in (3, 4))
    assert three.linear == four.linear < 1.0
    assert three.seconds == max(three.device, three.host)
    assert cost.estimate([ChunkShape(9, 1)] * 9).seconds == 1.0  # no graph holds nine


@given(
    st.sampled_from(sorted(DEVICES)),
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 4000)).map(lambda t: ChunkShape(*t)), min_size=1,
             max_size=20),
)  # fmt: skip
def test_no_data_sheet_promises_less_than_the_floor(name: str, chunks: list[ChunkShape]) -> None:
    device = DEVICES[name]
    cost = StepCost(analytic_profile(LLAMA_8B, device, "bfloat16"))
    floor = FloorCost(LLAMA_8B, device.sustained(), "bfloat16")
    assert cost.estimate(chunks).seconds >= 0.99 * floor.seconds(floor.work(chunks))
    batch = Batch(0, [Chunk(i, c.start, c.length, (), c.sample) for i, c in enumerate(chunks)])
    assert cost(batch) == pytest.approx(cost.estimate(chunks).seconds, rel=1e-12)


def test_a_model_of_the_same_layers_is_priced_by_their_number() -> None:
    twice = replace(SPEC, num_layers=8, windows=(None,) * 8, vocab_size=300)
    scaled = StepCost(scaled_profile(ideal(), twice, "twice"))
    old = StepCost(ideal()).estimate([ChunkShape(500, 1), ChunkShape(0, 100)])
    new = scaled.estimate([ChunkShape(500, 1), ChunkShape(0, 100)])
    assert new.linear == pytest.approx(2 * old.linear)
    assert new.attention == pytest.approx(2 * old.attention)
    assert new.head == pytest.approx(3 * old.head)
    assert new.host == old.host
    assert new.high / new.seconds > old.high / old.seconds
    assert new.source == "interpolated"


def test_layers_too_unlike_are_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate this model"):
        scaled_profile(ideal(), replace(SPEC, hidden_size=256, intermediate_size=1024), "wide")


def test_a_profile_is_found_by_file_by_device_and_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="calibrate"):
        open_profile(None, SPEC, model="me")
    ideal().save(own_path("me"))
    assert open_profile(None, SPEC, model="me") == ideal()
    assert open_profile(own_path("me"), SPEC, model="x").source == "measured"
    assert open_profile("l4", LLAMA_8B, model="x").source == "analytic"
    assert open_profile("analytic:h200", LLAMA_8B, model="x").device == "h200"
    for unknown in ("analytic:cray", "nothing", "no/such/file.json"):
        with pytest.raises(ConfigError) as caught:
            open_profile(unknown, SPEC, model="x")
        assert "\n" not in str(caught.value)


def test_every_shipped_profile_loads_and_says_what_it_is() -> None:
    for key, files in named.shipped().items():
        for file in files:
            profile = named._load_shipped(key, file)
            assert isinstance(profile, Profile)
            assert profile.source == "measured"
            assert profile.held_out
            same = open_profile(key, profile.spec, model=profile.model, weight_format=profile.weight_format)
            assert same == profile


def test_the_fit_finds_how_much_each_component_is_off() -> None:
    """A machine whose components are off by known factors, and whose steps are noisy now and then."""
    truth = Scales(1.3, 0.7, 1.6, 0.8)
    cost, rng, steps = StepCost(ideal()), random.Random(0), []
    for number in range(200):
        shape = [ChunkShape(rng.randrange(1, 2000), 1) for _ in range(rng.randrange(1, 60))]
        if number % 2:
            shape.append(ChunkShape(rng.choice((0, 2000)), rng.randrange(8, 1000), rng.random() < 0.5))
        estimate = cost.estimate(shape)
        steps.append((estimate, truth.seconds(estimate) * (3.0 if number % 25 == 0 else 1.0)))
    found = fitted_scales(steps, ridge=1e-7)
    for name, scale in found.as_dict().items():
        assert scale == pytest.approx(getattr(truth, name), rel=0.05), name
    fitted = StepCost(found.applied(ideal())).estimate([ChunkShape(100, 1)])
    assert fitted.device == pytest.approx(found.seconds(cost.estimate([ChunkShape(100, 1)])))


def test_nothing_moves_without_steps_and_nothing_leaves_the_bounds() -> None:
    assert fitted_scales([]) == Scales()
    estimate = StepCost(ideal()).estimate([ChunkShape(10, 1)])
    far = fitted_scales([(estimate, 100 * estimate.device)] * 20)
    assert max(far.as_dict().values()) <= 2.0


@given(st.integers(0, 1000), st.integers(20, 200))
def test_intervals_of_a_sample_hold_nine_of_ten_of_it(seed: int, count: int) -> None:
    rng = random.Random(seed)
    ordered = sorted(rng.lognormvariate(0, 0.2) for _ in range(count))
    low, high = interval_of(ordered)
    assert sum(low <= value <= high for value in ordered) >= 0.88 * count


def test_held_out_steps_give_an_interval_to_each_kind() -> None:
    cost = StepCost(ideal())
    decode = [((ChunkShape(9, 1),), 1.5 * cost.estimate([ChunkShape(9, 1)]).device)] * 10
    chunk = (ChunkShape(0, 64),)
    steps = [*decode, *[(chunk, 0.8 * cost.estimate(chunk).device)] * 10]
    profile = judged(ideal(), steps)
    assert profile.interval("decode") == (1.0, pytest.approx(1.5))
    assert profile.interval("prefill") == (pytest.approx(0.8), 1.0)
    assert len(profile.held_out) == 20


def test_what_holds_for_one_model_alone_is_not_scaled_to_another(tmp_path: Path) -> None:
    measured = replace(ideal(), reference_seconds=0.02, weight_bytes=123, process_bytes=456)
    measured.save(tmp_path / "p.json")
    kept = Profile.load(tmp_path / "p.json")
    assert (kept.reference_seconds, kept.weight_bytes, kept.process_bytes) == (0.02, 123, 456)
    other = scaled_profile(kept, replace(SPEC, num_layers=2 * SPEC.num_layers, windows=SPEC.windows * 2), "other")
    assert (other.reference_seconds, other.weight_bytes, other.process_bytes) == (0.0, 0, 456)
