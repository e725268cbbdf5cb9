"""The floor under a step against sums written out, and against the table of other engines' figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.benchmark.setup import Subject
from foretell.config import ModelSpec, SchedulerConfig
from foretell.cost import ChunkShape, FloorCost, Hardware, WeightBytes
from foretell.cost.floor import visible_pairs
from foretell.model.parameters import weight_shapes
from foretell.trace import Objectives, summarize
from foretell.trace.workloads import TraceRequest, Workload

SPEC = ModelSpec(
    family="llama", num_layers=3, hidden_size=16, intermediate_size=40, num_heads=4, num_kv_heads=2, head_dim=4,
    vocab_size=100, max_position_embeddings=4096, windows=(None, 8, None), tied_embeddings=True,
)  # fmt: skip
HARDWARE = Hardware(1, 1e9, {"float32": 1e9, "bfloat16": 4e9})
SHAPES = Path(__file__).resolve().parents[3] / "shared" / "shapes"
CHUNKS = st.lists(
    st.builds(ChunkShape, st.integers(0, 50), st.integers(1, 50), st.booleans()), min_size=1, max_size=5
)


@given(st.integers(0, 60), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 40)))
def test_pairs_are_those_one_can_count(start, length, window):
    counted = sum(min(p + 1, window or p + 1) for p in range(start, start + length))
    assert visible_pairs(start, length, window) == counted


@given(CHUNKS, st.booleans())
def test_work_is_what_the_architecture_says(chunks, tied):
    spec = replace(SPEC, tied_embeddings=tied)
    work = FloorCost(spec, HARDWARE, "bfloat16").work(chunks)
    shapes = weight_shapes(spec)
    inside = {n: s for n, s in shapes.items() if n.startswith(("layers.", "final_norm."))}
    size = {n: s[0] * (s[1] if len(s) > 1 else 1) for n, s in inside.items()}
    tokens, sampled = sum(c.length for c in chunks), sum(c.sample for c in chunks)
    head = 100 * 16
    assert work.weight_bytes == 2 * (sum(size.values()) + (head if sampled else 0) + tokens * 16)
    matrices = sum(n for name, n in size.items() if len(inside[name]) == 2)
    assert work.linear_flops == 2 * matrices * tokens + 2 * head * sampled
    kv, pairs = 0, 0
    for window in spec.windows:
        for c in chunks:
            kv += min(c.start, (window or 10**9) - 1) + c.length
            pairs += visible_pairs(c.start, c.length, window)
    assert work.kv_bytes == kv * 2 * 2 * 4 * 2
    assert work.attention_flops == pairs * 4 * 4 * 4


@given(CHUNKS, st.integers(1, 1000))
def test_linear_terms_see_tokens_alone_attention_sees_the_past(chunks, further):
    cost = FloorCost(replace(SPEC, windows=(None, None, None)), HARDWARE, "float32")
    now = cost.work(chunks)
    later = cost.work([replace(c, start=c.start + further) for c in chunks])
    assert (later.linear_flops, later.weight_bytes) == (now.linear_flops, now.weight_bytes)
    assert later.attention_flops > now.attention_flops
    assert later.kv_bytes > now.kv_bytes


def test_seconds_are_the_larger_of_reading_and_computing():
    reading = FloorCost(SPEC, replace(HARDWARE, flops_per_second={"float32": 1e30}), "float32")
    work = reading.work([ChunkShape(3, 1)])
    assert reading.seconds(work) == work.bytes / 1e9
    computing = FloorCost(SPEC, replace(HARDWARE, read_bytes_per_second=1e30), "bfloat16")
    assert computing.seconds(work) == work.flops / 4e9


def test_weights_count_as_they_are_kept():
    kept = WeightBytes(layers=1000.0, head=100.0, embedding_row=10.0)
    cost = FloorCost(SPEC, HARDWARE, "bfloat16", kept)
    assert cost.work([ChunkShape(0, 3)]).weight_bytes == 1130
    assert cost.work([ChunkShape(0, 3, sample=False)]).weight_bytes == 1030
    assert (
        cost.work([ChunkShape(0, 3)]).kv_bytes
        == FloorCost(SPEC, HARDWARE, "bfloat16").work([ChunkShape(0, 3)]).kv_bytes
    )


def test_narrow_weights_are_never_slower_than_widened_ones():
    slow = Hardware(1, 1e9, {"float32": 9.0, "bfloat16": 3.0})
    assert slow.rate("bfloat16") == slow.rate("float16") == slow.rate("float32") == 9.0


def test_the_best_of_two_measurements_counts():
    busy, quiet = Hardware(2, 1.0, {"float32": 5.0}), Hardware(2, 4.0, {"float32": 3.0})
    best = busy.best_with(quiet)
    assert best == Hardware(2, 4.0, {"float32": 5.0})
    assert best.exceeds(busy, 3.9)
    assert not best.exceeds(busy, 4.0)


def test_hardware_is_measured_once_and_better_if_asked_again(monkeypatch):
    from foretell.cost import hardware

    measured = iter([Hardware(2, 1.0, {"float32": 5.0}), Hardware(2, 4.0, {"float32": 3.0})])
    monkeypatch.setattr(hardware, "_known", {})
    monkeypatch.setattr(hardware, "_measure", lambda threads: next(measured))
    assert hardware.measure_hardware() is hardware.measure_hardware()
    assert hardware.measure_hardware(again=True) == Hardware(2, 4.0, {"float32": 5.0})


@pytest.mark.skipif(not SHAPES.exists(), reason="the shapes are not on this machine")
@pytest.mark.parametrize(
    ("model", "batch", "prompt", "output", "milliseconds"),
    [
        ("llama-3.1-8b", 1, 128, 256, 3.53),
        ("llama-3.1-8b", 32, 128, 256, 3.78),
        ("llama-3.1-8b", 32, 8192, 128, 11.65),
        ("qwen3-0.6b", 1, 128, 256, 0.28),
        ("qwen3-0.6b", 32, 128, 256, 0.50),
        ("gemma-3-1b", 1, 128, 256, 0.47),
    ],
)
def test_decode_floors_are_those_of_the_published_table(model, batch, prompt, output, milliseconds):
    cost = FloorCost(shape(model), Hardware(1, 4.26e12, {"float32": 788e12}), "bfloat16")
    steps = [cost.seconds(cost.work([ChunkShape(prompt + i, 1)] * batch)) for i in range(output - 1)]
    assert sum(steps) / len(steps) * 1e3 == pytest.approx(milliseconds, rel=0.025)


@pytest.mark.skipif(not SHAPES.exists(), reason="the shapes are not on this machine")
@pytest.mark.parametrize(("model", "rate"), [("llama-3.1-8b", 52e3), ("qwen3-0.6b", 580e3)])
def test_prefill_floors_are_those_of_the_published_table(model, rate):
    cost = FloorCost(shape(model), Hardware(1, 4.26e12, {"float32": 788e12}), "bfloat16")
    assert 4096 / cost.seconds(cost.work([ChunkShape(0, 4096)])) == pytest.approx(rate, rel=0.02)


def shape(model):
    from foretell.model.families import resolve_spec

    return resolve_spec(json.loads((SHAPES / model / "config.json").read_text()))


# -- a workload in virtual time ---------------------------------------------------------------------------


def subject(**changes):
    config = SchedulerConfig(**{"max_num_seqs": 8, "max_model_len": 512, "enable_prefix_caching": False, **changes})
    spec = replace(SPEC, windows=(None, None, None))
    return Subject(
        "tiny", spec, "float32", config, (400,), HARDWARE, WeightBytes.in_dtype(spec, "float32"), "float32"
    )


def test_floor_of_a_decode_workload_is_the_sum_of_its_steps():
    tiny = subject()
    run = tiny.floor(Workload("w", "", tuple(TraceRequest(20, 10) for _ in range(4))))
    cost = FloorCost(tiny.spec, HARDWARE, "float32")
    prefill = cost.seconds(cost.work([ChunkShape(0, 20)] * 4))
    decode = sum(cost.seconds(cost.work([ChunkShape(20 + i, 1)] * 4)) for i in range(9))
    assert run.seconds == pytest.approx(prefill + decode)
    assert run.steps == 10
    assert all(len(r.token_times) == 10 and r.ttft_seconds == pytest.approx(prefill) for r in run.requests)


@given(st.lists(st.tuples(st.floats(0, 2e-4), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=12))
def test_arrivals_are_kept_to_the_moment(items):
    """Nothing runs before it arrives, nothing is lost, and with time to spare latencies are those of one alone."""
    requests = tuple(TraceRequest(p, o, a) for a, p, o in sorted(items))
    run = subject().floor(Workload("w", "", requests))
    for asked, served in zip(requests, run.requests, strict=True):
        assert len(served.token_times) == asked.output_len
        assert served.arrival == asked.arrival_seconds
        assert served.queue_seconds >= -1e-12
        assert served.ttft_seconds > 0
    report = summarize(run.requests, Objectives())
    assert report.output_tokens == sum(r.output_len for r in requests)


def test_a_request_that_comes_after_a_pause_meets_an_idle_engine():
    requests = (TraceRequest(20, 5, 0.0), TraceRequest(20, 5, 100.0))
    first, second = subject().floor(Workload("w", "", requests)).requests
    assert second.ttft_seconds == pytest.approx(first.ttft_seconds)
    assert second.queue_seconds == 0


def test_policies_trade_ttft_for_tpot():
    requests = tuple(TraceRequest(300, 40, i * 2e-4) for i in range(12))
    tiny = subject(max_num_batched_tokens=300, starvation_turns=10_000)
    reports = {
        policy: summarize(tiny.floor(Workload("w", "", requests), policy=policy).requests)
        for policy in ("prefill-first", "decode-first", "mixed")
    }
    assert reports["prefill-first"].ttft_seconds.p50 < reports["decode-first"].ttft_seconds.p50
    assert reports["decode-first"].tpot_seconds.p50 < reports["prefill-first"].tpot_seconds.p50
