"""A plan whose profile turns out wrong is made again, beside the server that runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.core.messages import Batch, Chunk, Result
from foretell.cost.named import own_path, refitted_path
from foretell.cost.profile import Profile
from foretell.cost.refit import Scales
from foretell.cost.step import StepCost
from foretell.cost.watch import StepWatch
from foretell.errors import ConfigError
from foretell.model.load import spec_for
from foretell.plan import again as planning
from foretell.plan.again import PlanWatch, again, again_path, main
from foretell.plan.command import PlanAsked, make_plan
from foretell.plan.plan import load, save
from foretell.server.engine_process import drifted
from foretell.store import resolve
from tests.unit.test_plan import TINY, profile

Planned = tuple[dict[str, Any], Profile, Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Profile, Path]]:
    """A plan, the calibration it was made with, and a folder."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORETELL_HOME", str(folder / "home"))
        patch.setattr(planning, "MOST", 12)
        (folder / "tiny").mkdir()
        (folder / "tiny" / "config.json").write_text(json.dumps(TINY))
        own = replace(profile(), model="tiny", spec=spec_for(resolve(str(folder / "tiny"))))
        own.save(own_path("tiny"))
        traffic = Traffic(prompt_lengths="64-512", output_lengths="16-48", num_requests=30)
        limits = "ttft_p90=400ms,tpot_p90=20ms"
        made = make_plan(PlanAsked(str(folder / "tiny"), traffic, Arrivals(rate=25.0), limits, most=12))
        yield made.as_dict(), own, folder


@pytest.fixture
def planned(home: tuple[dict[str, Any], Profile, Path]) -> Planned:
    """A plan as its file has it, the calibration it was made with, and where it is."""
    data, own, folder = home
    path = folder / "plan.json"
    save(data, path)
    refitted_path("tiny").unlink(missing_ok=True)
    return load(path), own, path


def served(data: dict[str, Any], **winner: Any) -> dict[str, Any]:
    """The plan's file, as if it had chosen otherwise."""
    return {**data, "winner": {**data["winner"], **winner}}


def test_a_machine_as_foretold_leaves_the_plan_as_it_is(planned: Planned) -> None:
    data, own, _ = planned
    own.save(refitted_path("tiny"))
    made, words = again(data, refitted_path("tiny"))
    assert made is None
    assert words.startswith("the plan stands")


def test_a_better_plan_is_kept_and_can_be_served(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    data, own, path = planned
    save(served(data, policy="decode-first", max_num_seqs=1, max_chunk_tokens=64), path)
    Scales(linear=1.5).applied(own).save(refitted_path("tiny"))
    assert main(str(path), str(refitted_path("tiny"))) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    kept = again_path(data["model"])
    assert f"foretell serve --plan {kept}" in said
    assert load(kept)["asked"] == {**data["asked"], "profiles": [str(refitted_path("tiny"))]}


def test_what_cannot_be_planned_again_says_so_in_a_line(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    data, _, path = planned
    save({**data, "asked": None}, path)
    assert main(str(path), str(refitted_path("tiny"))) == 0
    assert "does not say what it was made for" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be read"):
        again(data, refitted_path("tiny"))


def test_drift_is_kept_beside_the_calibration(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    _, own, _ = planned
    watch, cost = StepWatch(own, on_wrong=drifted), StepCost(own)
    for number in range(2000):
        chunks = [Chunk(i, 50 + number % 100, 1, ((),), True) for i in range(1 + number % 8)]
        watch(Batch(number, chunks), Result(number, [], 0.0, 1.5 * cost.estimate(chunks).device))
    kept, chunks = Profile.load(refitted_path("tiny")), [Chunk(i, 80, 1, ((),), True) for i in range(4)]
    assert 1.2 < StepCost(kept).estimate(chunks).device / cost.estimate(chunks).device < 1.6
    assert Profile.load(own_path("tiny")) == own  # the calibration itself stays
    assert str(refitted_path("tiny")) in capsys.readouterr().err


def test_a_server_looks_until_its_engine_says_that_the_profile_is_wrong(planned: Planned) -> None:
    _, own, path = planned
    figures: dict[str, Any] = {"prediction": None}
    watch = PlanWatch(path, "tiny", lambda: figures)
    assert not watch.look()
    figures["prediction"] = {"wrong": False}
    assert not watch.look()
    figures["prediction"] = {"wrong": True}
    assert not watch.look()  # not before the profile is there
    own.save(refitted_path("tiny"))
    assert watch.look()
    watch.end()
    assert watch.process is not None
    assert watch.process.returncode is not None
