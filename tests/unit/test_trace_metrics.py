"""Metrics against numpy and against formulas written out by hand."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.trace import Objectives, RequestTimes, summarize
from foretell.trace.metrics import Spread, percentile

SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(SECONDS, min_size=1, max_size=100), st.floats(0, 100))
def test_percentiles_are_numpys(values, percent):
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-9)


@given(st.lists(SECONDS, min_size=1, max_size=50))
def test_spread_is_numpys(values):
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert [spread.p50, spread.p90, spread.p99] == pytest.approx(
        np.percentile(values, [50, 90, 99]), rel=1e-9, abs=1e-9
    )
    assert (spread.count, spread.max) == (len(values), max(values))


def test_an_empty_spread_is_nan():
    spread = Spread.of([])
    assert spread.count == 0
    assert math.isnan(spread.mean)


def test_one_request_by_hand():
    request = RequestTimes(arrival=1.0, prompt_tokens=10, token_times=[3.0, 3.5, 4.5], first_scheduled=2.0)
    assert request.queue_seconds == 1.0
    assert request.ttft_seconds == 2.0
    assert request.tpot_seconds == 0.75
    assert request.itl_seconds == [0.5, 1.0]
    assert request.e2e_seconds == 3.5


REQUESTS = st.builds(
    lambda arrival, gaps, scheduled, failed: RequestTimes(
        arrival=arrival,
        prompt_tokens=7,
        token_times=list(np.cumsum([arrival, *gaps]))[1:],
        first_scheduled=arrival if scheduled else None,
        error="it failed" if failed else None,
    ),
    st.floats(0, 100),
    st.lists(st.floats(0, 5), max_size=6),
    st.booleans(),
    st.integers(0, 4).map(lambda n: n == 0),
)
LIMITS = st.one_of(st.none(), st.floats(0, 10))


@given(st.lists(REQUESTS, max_size=12), LIMITS, LIMITS, LIMITS)
def test_goodput_counts_those_that_met_every_objective(requests, ttft, tpot, e2e):
    report = summarize(requests, Objectives(ttft, tpot, e2e))
    good = 0
    for r in requests:
        times = r.token_times
        ok = r.error is None and len(times) > 0
        ok = ok and (ttft is None or times[0] - r.arrival <= ttft)
        ok = ok and (e2e is None or times[-1] - r.arrival <= e2e)
        if ok and tpot is not None and len(times) > 1:
            ok = (times[-1] - times[0]) / (len(times) - 1) <= tpot
        good += ok
    ends = [r.token_times[-1] for r in requests if len(r.token_times)]
    seconds = max(ends) - min(r.arrival for r in requests) if ends else 0.0
    assert report.duration_seconds == pytest.approx(seconds)
    assert report.goodput_per_second == pytest.approx(good / seconds if seconds else 0.0)
    assert report.good_share == pytest.approx(good / len(requests) if requests else 0.0)
    json.dumps(report.as_dict(), allow_nan=False)


def test_throughput_counts_what_was_served():
    served = RequestTimes(0.0, 10, [1.0, 2.0], preemptions=1, cached_tokens=4)
    failed = RequestTimes(0.0, 10, [1.0], error="lost")
    report = summarize([served, failed])
    assert (report.requests, report.failed, report.preemptions, report.cached_tokens) == (2, 1, 1, 4)
    assert report.output_tokens_per_second == 1.0
    assert report.prompt_tokens_per_second == 5.0
    assert report.requests_per_second == 0.5
    assert summarize([served], duration_seconds=10).requests_per_second == 0.1


def test_nothing_served_is_a_report_too():
    report = summarize([])
    assert report.requests_per_second == 0
    assert report.as_dict()["ttft_seconds"] is None
