"""What is recorded of a virtual run adds up to the run, with and without running ahead; the timeline holds it all."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from foretell.benchmark.recording import Recording, timeline, write_timeline
from foretell.benchmark.simulate import VirtualRun, simulate
from foretell.benchmark.traffic import burstiness_of
from foretell.config import SchedulerConfig
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from foretell.trace.arrivals import arrival_times
from foretell.trace.workloads import Lengths, random_workload
from tests.unit.test_cost_step import ideal

CONFIG = SchedulerConfig(max_num_seqs=4, max_model_len=512, max_num_batched_tokens=128)


def run(*, overlaps: bool = False) -> tuple[VirtualRun, Recording]:
    workload = random_workload(30, Lengths.parse("20-200"), Lengths.parse("4-60"), 3)
    workload = workload.arriving_at(arrival_times(30, 25.0, seed=1))
    recording = Recording()
    found = simulate(workload, 100, CONFIG, (64,), [None], StepCost(ideal()), recording=recording, overlaps=overlaps)
    return found, recording


@pytest.mark.parametrize("overlaps", [False, True])
def test_recorded_steps_are_the_runs_steps(overlaps: bool) -> None:
    found, recording = run(overlaps=overlaps)
    moments = recording.moments
    assert sum(m.steps for m in moments) == found.steps
    assert any(m.steps > 1 for m in moments)
    computed = sum(m.tokens * m.steps for m in moments)
    produced = sum(r.prompt_tokens + r.num_tokens - 1 for r in found.requests)
    assert computed >= produced  # what a preemption throws away is computed again
    for before, after in itertools.pairwise(moments):
        assert after.started >= before.finished - 1e-9


def test_load_is_between_its_bounds_and_weighs_by_time() -> None:
    found, recording = run()
    load = recording.load(found.seconds)
    busy = math.fsum(m.seconds for m in recording.moments)
    assert load.busy_share == pytest.approx(busy / found.seconds)
    assert 0 < load.kv_usage_mean <= load.kv_usage_max <= 1
    assert 1 < load.running_max <= 4
    assert load.waiting_max > 0
    assert 1 <= load.sequences_per_step <= 4
    twice = recording.load(2 * found.seconds)
    assert twice.busy_share == pytest.approx(load.busy_share / 2)


def test_the_timeline_holds_every_request_and_step(tmp_path: Path) -> None:
    found, recording = run()
    write_timeline(tmp_path / "t.json", found.requests, recording.moments, "test")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert len(steps) == len(recording.moments)
    lanes: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X" and event["pid"] == 2:
            lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert {e["args"]["request"] for e in events if e["ph"] == "X" and e["pid"] == 2} == set(range(30))
    for spans in lanes.values():  # one request at a time in each lane
        ordered = sorted(spans)
        assert all(b[0] >= a[1] - 1e-3 for a, b in itertools.pairwise(ordered))
    ends = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert ends == pytest.approx(1e6 * found.seconds)
    assert timeline([], [], "nothing")["traceEvents"]
    with pytest.raises(ConfigError, match="cannot write"):
        write_timeline(tmp_path / "no" / "t.json", [], [], "test")


def test_arrivals_have_names() -> None:
    assert burstiness_of("poisson", None) == 1.0
    assert burstiness_of("constant", None) == math.inf
    assert burstiness_of("gamma", None) < 1.0
    assert burstiness_of("gamma", 3.0) == 3.0
    with pytest.raises(ConfigError, match="constant"):
        burstiness_of("constant", 2.0)
