"""Calibration on a small model: every kind of step is measured, and the commands fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foretell import LLM, SamplingParams
from foretell.cli.app import app
from foretell.cost import calibrate
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from tests.model import models


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "POINT_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "TOKENS", (1, 4, 16, 64, 100))
    monkeypatch.setattr(calibrate, "ROWS", (1, 8))
    monkeypatch.setattr(calibrate, "DECODE", ((1, 64), (4, 100)))
    monkeypatch.setattr(calibrate, "PREFILL", ((64, 0), (32, 64)))
    monkeypatch.setattr(calibrate, "HELD_OUT", 4)


@pytest.mark.parametrize("name", ["glassllm", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def test_a_calibrated_engine_still_serves_and_its_steps_are_priced(quick: None, name: str) -> None:
    options = {"max_model_len": 128, "kv_cache_bytes": 20_000_000, "enable_prefix_caching": False}
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False, ignore_eos=True)
    prompt = list(models.info(name).prompt)
    with LLM(str(models.prepare(name)), **options) as llm:  # type: ignore[arg-type]
        before = llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids
        profile = calibrate.calibrate(llm)
        assert llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids == before
        assert max(llm.assembly.engine.executor.runner.states) < calibrate.FIRST_ID  # type: ignore[attr-defined]
    assert profile.linear.x[-1] == 100
    assert all(seconds > 0 for seconds in profile.linear.y)
    assert profile.held_out
    assert 0 < profile.low <= 1 <= profile.high
    cost = StepCost(profile)
    for step in profile.held_out:
        assert step["predicted"] > 0
    assert cost.profile.spec == llm.spec


def test_a_prefix_cache_is_not_overwritten() -> None:
    with (
        LLM(str(models.prepare("glassllm")), kv_cache_bytes=4_000_000) as llm,
        pytest.raises(ConfigError, match="prefix cache"),
    ):
        calibrate.calibrate(llm)


def test_calibrate_then_simulate(quick: None, tmp_path: Path) -> None:
    runner, path, result = CliRunner(), tmp_path / "p.json", tmp_path / "r.json"
    model = str(models.prepare("glassllm"))
    done = runner.invoke(app, ["calibrate", model, "--profile", str(path)])
    assert done.exit_code == 0, done.output
    assert "held out" in done.output
    assert Profile.load(path).kernels
    asked = ["--rate", "50", "--num-requests", "20", "--input-len", "8-40", "--output-len", "4-20"]
    extra = ["--compare-policies", "--slo-ttft-ms", "500", "--json", str(result)]
    done = runner.invoke(app, ["simulate", model, "--profile", str(path), *asked, *extra])
    assert done.exit_code == 0, done.output
    figures = json.loads(result.read_text())
    assert set(figures["predicted"]) == {"prefill-first", "decode-first", "mixed"}
    for report in figures["predicted"].values():
        assert report["requests"] == 20
        assert report["ttft_seconds"]["p50"] > 0
    other = runner.invoke(app, ["simulate", str(models.prepare("microformer")), "--profile", str(path), *asked])
    assert other.exit_code == 1
    assert "shapes" in other.output
