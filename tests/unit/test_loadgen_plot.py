"""The picture: well-formed whatever the run was, and true to the numbers."""

import math
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.loadgen.plot import open_requests, picture, ticks, token_rate
from foretell.trace import Objectives, RequestTimes, summarize

seconds = st.floats(0, 100)


@st.composite
def requests(draw):
    arrival = draw(seconds)
    gaps = draw(st.lists(st.floats(0, 5), max_size=5))
    times = [arrival + sum(gaps[: i + 1]) for i in range(len(gaps))]
    return RequestTimes(arrival, 10, times, error=draw(st.sampled_from([None, "HTTP 500"])))


@settings(max_examples=40)
@given(st.lists(requests(), max_size=12), st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"])))
def test_any_run_makes_a_picture(made, title):
    objectives = Objectives(0.5, None, 20.0)
    svg = picture(title, made, summarize(made, objectives), objectives)
    root = ElementTree.fromstring(svg)
    assert title in [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "nan" not in svg
    assert "inf" not in svg.replace(title, "")


@given(st.lists(requests(), min_size=1, max_size=12))
def test_load_over_time_adds_up(made):
    served = [r for r in made if r.served]
    opened = open_requests(made)
    assert opened[-1][1] == 0
    end = max((r.token_times[-1] for r in served), default=0.0) or 1.0
    rate = token_rate(made, end)
    width = rate[0][0] * 2
    assert math.isclose(sum(value * width for _, value in rate), sum(r.num_tokens for r in served), abs_tol=1e-6)


@given(st.floats(1e-9, 1e9), st.integers(2, 10))
def test_ticks_are_few_and_within(top, about):
    found = ticks(top, about)
    assert found[0] == 0
    assert found[-1] <= top * (1 + 1e-9)
    assert len(found) <= about + 1
