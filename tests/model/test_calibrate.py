"""Calibration on a small model: every kind of step is measured, and the commands fit together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foretell import LLM, SamplingParams
from foretell.cli.app import app
from foretell.config import SchedulerConfig
from foretell.cost import calibrate, stepping
from foretell.cost.floor import ChunkShape
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from foretell.memory import resident_bytes
from foretell.server.metrics import Metrics
from tests.model import models
from tests.model.test_device_runner import make_engine

QUICK = calibrate.Grid(
    tokens=(1, 4, 16, 64, 100), rows=(1, 8), decode=((1, 64), (4, 100)), prefill=((64, 0), (32, 64)), host=(1, 4),
    held_out=8,
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "POINT_SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "CPU_GRID", QUICK)


@pytest.mark.parametrize("name", ["glassllm", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
def test_a_calibrated_engine_still_serves_and_its_steps_are_priced(quick: None, name: str) -> None:
    options = {"max_model_len": 128, "kv_cache_bytes": 20_000_000, "enable_prefix_caching": False}
    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False, ignore_eos=True)
    prompt = list(models.info(name).prompt)
    with LLM(str(models.prepare(name)), **options) as llm:  # type: ignore[arg-type]
        before = llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids
        profile = calibrate.calibrate(llm)
        assert llm.generate([prompt], params, progress=False)[0].outputs[0].token_ids == before
        assert max(llm.assembly.engine.executor.runner.states) < stepping.FIRST_ID  # type: ignore[attr-defined]
        assert profile.weight_bytes == llm.assembly.weight_bytes > 0
        held = profile.weight_bytes + profile.process_bytes + llm.assembly.kv_bytes
        assert held == pytest.approx(resident_bytes(), rel=0.1)  # of this process, before its next step
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
    extra = ["--compare-policies", "--slo", "ttft=500ms", "--json", str(result)]
    done = runner.invoke(app, ["simulate", model, "--profile", str(path), *asked, *extra])
    assert done.exit_code == 0, done.output
    figures = json.loads(result.read_text())
    assert set(figures["predicted"]) == {"prefill-first", "decode-first", "mixed"}
    for report in figures["predicted"].values():
        assert report["requests"] == 20
        assert 0 < report["load"]["kv_usage_max"] <= 1
        assert report["ttft_seconds"]["p50"] > 0
    files = ["--timeline", str(tmp_path / "t.json"), "--plot", str(tmp_path / "p.svg"), "--arrivals", "constant"]
    done = runner.invoke(app, ["simulate", model, "--profile", str(path), *asked, *files])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "p.svg").read_text().startswith("<svg")
    done = runner.invoke(app, ["simulate", model, "--profile", "h100", *asked])
    assert done.exit_code == 0, done.output
    assert "data sheet" in done.output
    other = runner.invoke(app, ["simulate", str(models.prepare("microformer")), "--profile", str(path), *asked])
    assert other.exit_code == 1
    assert "layers are" in other.output
    assert "calibrate this model" in other.output


def test_a_device_is_measured_through_the_same_code() -> None:
    """The runner for devices on CPU tensors: every operator gets a grid, slots and requests are given back."""
    engine = make_engine(SchedulerConfig(max_num_seqs=12, max_model_len=128, enable_prefix_caching=False), 200, [],
                         padded=True)  # fmt: skip
    runner = engine.executor.runner  # type: ignore[attr-defined]
    files = SimpleNamespace(name="glassllm")
    assembly = SimpleNamespace(
        engine=engine, options=SimpleNamespace(block_size=16, num_threads=None), max_model_len=128, files=files,
        dtype="float32",
        weight_format="float32", weight_bytes=1, kernels="reference", device="cpu",
    )  # fmt: skip
    llm: Any = SimpleNamespace(assembly=assembly, spec=runner.model.spec)
    bench = stepping.StepBench(llm)
    with torch.inference_mode():
        profile = calibrate._Measuring(bench, QUICK, lambda done, what: None).profile(llm)
    assert len(runner.free_slots) == 12
    assert not runner.states
    assert profile.overlaps
    assert profile.decode_linear is not None
    assert profile.decode_linear.x == (1.0, 8.0)
    assert profile.graph_sizes == (1, 2, 4, 8, 12)
    assert profile.eager_seconds > 0
    cost = StepCost(profile)
    assert cost.estimate([ChunkShape(5, 1)] * 9).linear == cost.estimate([ChunkShape(5, 1)] * 12).linear
    assert cost.estimate([ChunkShape(0, 20)]).seconds >= profile.eager_seconds


def test_a_calibrated_machine_shows_predictions_beside_measurements(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path))
    runner, result, model = CliRunner(), tmp_path / "r.json", str(models.prepare("glassllm"))
    asked = ["--num-requests", "3", "--input-len", "20", "--output-len", "8", "--json", str(result)]
    engine = ["--kv-cache-bytes", "20MB", "--max-model-len", "128"]
    done = runner.invoke(app, ["bench", "offline", model, *asked, *engine, "--repeat", "1"])
    assert "predicted" not in done.output
    assert runner.invoke(app, ["calibrate", model]).exit_code == 0
    done = runner.invoke(app, ["bench", "offline", model, *asked, *engine, "--repeat", "1"])
    assert done.exit_code == 0, done.output
    assert "steps compared with their predictions" in done.output
    assert json.loads(result.read_text())["predicted_wall_seconds"] > 0
    done = runner.invoke(app, ["bench", "online", model, *asked, *engine, "--rate", "100"])
    assert done.exit_code == 0, done.output
    assert "predicted / measured, ms" in done.output
    figures = json.loads(result.read_text())
    said, found, off = (figures[name]["mixed"] for name in ("predicted", "measured", "prediction_errors"))
    assert off["ttft_seconds.p50"] == pytest.approx(
        said["ttft_seconds"]["p50"] / found["ttft_seconds"]["p50"] - 1, abs=1e-4
    )
    done = runner.invoke(app, ["run", model, "--ids", "1,2,3,4,5", "-n", "4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["predicted_tpot_seconds"] > 0


def test_the_live_check_reaches_the_metrics(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path))
    model = str(models.prepare("glassllm"))
    assert CliRunner().invoke(app, ["calibrate", model]).exit_code == 0
    with LLM(model, kv_cache_bytes=4_000_000, max_model_len=128) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False), progress=False)
        engine = llm.assembly.engine
        text = Metrics(SimpleNamespace(stats=engine.stats), lambda: "m").text().decode()  # type: ignore[arg-type]
    steps = next(line for line in text.splitlines() if line.startswith("foretell:predicted_steps_total"))
    assert float(steps.split()[-1]) == 5
    assert 'foretell:profile_scale{component="linear",model_name="m"} 1.0' in text
    with LLM(model, kv_cache_bytes=4_000_000, max_model_len=128, num_threads=7) as llm:
        assert llm.assembly.engine.watcher is None  # calibrated with another number of threads
