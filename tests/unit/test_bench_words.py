"""Tables, plots and step summaries."""

import math

from hypothesis import given
from hypothesis import strategies as st

from foretell.benchmark.steps import summarize_steps
from foretell.benchmark.tables import cdf_rows, number, sparkline, table, timeline
from foretell.benchmark.traffic import Arrivals


def test_table_aligns():
    text = table(("", "a"), [("long name", 1), ("x", 22)])
    assert text.splitlines() == [
        "            a",
        "long name   1",
        "x          22",
    ]


def test_numbers_have_three_digits():
    texts = [number(v) for v in (0, 0.001234, 1.234, 12.34, 1234.5, None, math.nan)]
    assert texts == ["0", "0.00123", "1.23", "12.3", "1,234", "–", "–"]


def test_sparkline_is_in_proportion():
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 50)), max_size=30), st.floats(0, 10), st.integers(1, 80))
def test_timeline_keeps_the_peak(points, seconds, width):
    slices = timeline(sorted(points), seconds, width)
    assert len(slices) == width
    if points and seconds > 0:
        assert max(slices) == max(value for _, value in points)


@given(st.lists(st.floats(0, 100), max_size=30))
def test_cdf_rows_ascend(values):
    lengths = [row.count("█") for row in cdf_rows(values)]
    assert lengths == sorted(lengths)
    assert len(lengths) == (6 if values else 0)


def record(started, seconds, phases, preempted=()):
    chunks = [{"phase": phase, "tokens": 1} for phase in phases]
    return {
        "started": started, "finished": started + seconds, "seconds": seconds, "tokens": len(chunks),
        "chunks": chunks, "parts": {"forward": seconds / 2}, "preempted": list(preempted),
    }  # fmt: skip


def test_steps_are_told_apart_by_phase():
    summary = summarize_steps(
        [
            record(0.0, 1.0, ["prefill", "prefill"]),
            record(1.5, 0.5, ["decode"], preempted=[{"request": 1}]),
            record(2.0, 0.5, ["decode", "decode"]),
            record(2.5, 1.0, ["prefill", "decode"]),
        ]
    )
    assert {name: (p.steps, p.tokens, p.seconds) for name, p in summary.phases.items()} == {
        "prefill": (1, 2, 1.0), "decode": (2, 3, 1.0), "mixed": (1, 2, 1.0),
    }  # fmt: skip
    assert summary.phases["decode"].ms_per_step == 500
    assert summary.parts == {"forward": 1.5}
    assert summary.between_seconds == 0.5
    assert summary.preemptions == 1
    assert summarize_steps([]).phases == {}


def test_a_duration_draws_enough_requests():
    assert Arrivals(rate=10, duration_seconds=5).requests_needed() >= 75
    assert Arrivals(rate=10).requests_needed() is None
    assert Arrivals(rate=math.inf, duration_seconds=5).requests_needed() is None
