"""Workloads: the requests everybody is measured on, synthetic tokens that share what they should, arrivals."""

import importlib.util
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.errors import ConfigError
from foretell.trace import Lengths, TraceRequest, Workload, arrival_times, named_workload
from foretell.trace.workloads import NAMED, random_workload

SHARED = Path(__file__).resolve().parents[3] / "shared" / "workloads.py"


@pytest.mark.skipif(not SHARED.exists(), reason="the measured workloads are not on this machine")
@pytest.mark.parametrize("vocab_size", [32000, 151936])
def test_named_workloads_are_the_measured_ones(vocab_size):
    spec = importlib.util.spec_from_file_location("measured_workloads", SHARED)
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    for name, (description, build) in measured.WORKLOADS.items():
        ours = named_workload(name, vocab_size)
        assert [(list(r.prompt_token_ids), r.output_len) for r in ours.requests] == build(vocab_size)
        assert ours.description == description


@pytest.mark.parametrize("name", NAMED)
def test_named_workloads_fit_a_tiny_vocabulary(name):
    if NAMED[name][0].startswith(("1024", "256")):
        pytest.skip("large, and built by the same function as the others")
    workload = named_workload(name, 64)
    assert all(0 <= token < 64 for r in workload.requests for token in r.prompt_token_ids)
    assert all(r.arrival_seconds == 0 and len(r.prompt_token_ids) == r.prompt_len for r in workload.requests)


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match="decode-b1"):
        named_workload("decode", 1000)


@given(
    hashes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=2, max_size=5),
    block_tokens=st.sampled_from([16, 512]),
    variant=st.integers(0, 3),
    data=st.data(),
)
def test_equal_block_hashes_give_equal_tokens_and_nothing_else_is_shared(hashes, block_tokens, variant, data):
    requests = []
    for blocks in hashes:
        least = max(1, (len(blocks) - 1) * block_tokens + 1)
        length = data.draw(st.integers(least, (len(blocks) + 2) * block_tokens))
        requests.append(TraceRequest(length, 1, block_hashes=tuple(blocks), block_tokens=block_tokens))
    workload = Workload("w", "", tuple(requests))
    prompts = [workload.token_ids(i, 50_000, variant=variant) for i in range(len(requests))]
    assert [len(p) for p in prompts] == [r.prompt_len for r in requests]
    assert all(1000 <= t < 49_000 for p in prompts for t in p)
    for i, j in ((0, 1), (1, 0)):
        for block in range(min(len(hashes[i]), len(hashes[j]))):
            cut = slice(block * block_tokens, (block + 1) * block_tokens)
            both = list(zip(prompts[i][cut], prompts[j][cut], strict=False))
            same = sum(a == b for a, b in both)
            if hashes[i][block] == hashes[j][block]:
                assert same == len(both)
            elif len(both) >= 16:
                assert same < len(both) / 2
    assert workload.token_ids(0, 50_000, variant=variant + 1)[:16] != prompts[0][:16]


def test_own_blocks_differ_from_each_other_and_between_requests():
    workload = Workload("w", "", (TraceRequest(1024, 1), TraceRequest(1024, 1)))
    first, second = (workload.token_ids(i, 50_000) for i in range(2))
    assert first[:512] != first[512:]
    assert first[:512] != second[:512]
    assert first == workload.token_ids(0, 50_000)


def test_given_tokens_keep_shared_prefixes_in_every_variant():
    workload = Workload(
        "w", "", (TraceRequest(4, 1, prompt_token_ids=[1, 2, 3, 4]), TraceRequest(3, 1, prompt_token_ids=[1, 2, 9]))
    )
    assert workload.token_ids(0, 100) == [1, 2, 3, 4]
    a, b = (workload.token_ids(i, 100, variant=3) for i in range(2))
    assert a[:2] == b[:2] != [1, 2]
    assert all(0 <= t < 100 for t in a)


def test_adjusting_scales_caps_and_cuts():
    requests = tuple(TraceRequest(100, 50, float(i), prompt_token_ids=list(range(100))) for i in range(10))
    workload = Workload("w", "", requests)
    half = workload.adjusted(time_scale=0.5, duration_seconds=2.0, max_prompt_tokens=7, max_output_tokens=3)
    assert [r.arrival_seconds for r in half.requests] == [0.0, 0.5, 1.0, 1.5]
    assert half.requests[0].prompt_token_ids == list(range(7))
    assert (half.prompt_tokens, half.output_tokens) == (28, 12)
    assert len(workload.adjusted(max_requests=3).requests) == 3
    with pytest.raises(ConfigError, match="no request"):
        workload.adjusted(max_requests=0)
    with pytest.raises(ConfigError, match="time_scale"):
        workload.adjusted(time_scale=-1)


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(0, 2**32))
def test_lengths_stay_in_their_range(low, more, seed):
    lengths = Lengths.parse(f"{low}-{low + more}")
    assert low <= lengths.draw(random.Random(seed)) <= low + more
    assert Lengths.parse(str(low)).draw(random.Random(seed)) == low
    assert Lengths.parse(f"{low}~{more}").draw(random.Random(seed)) >= 1


@pytest.mark.parametrize("text", ["", "0", "-5", "5-3", "a", "1.5", "5-", "~3", "0~3", "1e3", "9" * 30, "²"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ConfigError, match="no length in tokens"):
        Lengths.parse(text)


def test_random_workloads_repeat_with_their_seed():
    prompt, output = Lengths.parse("64-256"), Lengths.parse("100~30")
    workload = random_workload(200, prompt, output, seed=3)
    assert workload == random_workload(200, prompt, output, seed=3)
    assert workload != random_workload(200, prompt, output, seed=4)
    assert abs(statistics.mean(r.output_len for r in workload.requests) - 100) < 10


# -- arrivals ---------------------------------------------------------------------------------------------


def gaps(times):
    return [b - a for a, b in zip([0.0, *times], times, strict=False)]


@pytest.mark.parametrize(("rate", "burstiness"), [(5.0, 1.0), (0.2, 1.0), (10.0, 0.25), (10.0, 4.0)])
def test_gaps_have_the_mean_and_variation_they_should(rate, burstiness):
    count = 20_000
    sample = gaps(arrival_times(count, rate, burstiness=burstiness, seed=1))
    mean = statistics.mean(sample)
    variation = statistics.pstdev(sample) / mean
    spread = 1 / math.sqrt(burstiness)
    assert abs(mean * rate - 1) < 4 * spread / math.sqrt(count)
    assert abs(variation / spread - 1) < 0.05


def test_a_poisson_process_has_poisson_counts():
    """Counts per second have mean and variance equal to the rate."""
    times = arrival_times(50_000, 10.0, seed=2)
    seconds = int(times[-1])
    counts = [0] * seconds
    for time in times:
        if time < seconds:
            counts[int(time)] += 1
    assert abs(statistics.mean(counts) - 10) < 0.2
    assert abs(statistics.variance(counts) - 10) < 0.8


@given(st.integers(0, 50), st.floats(0.01, 1000), st.floats(0.05, 20), st.integers(0, 2**40))
def test_arrivals_ascend_and_repeat(count, rate, burstiness, seed):
    times = arrival_times(count, rate, burstiness=burstiness, seed=seed)
    assert times == sorted(times) == arrival_times(count, rate, burstiness=burstiness, seed=seed)
    assert len(times) == count
    assert all(time >= 0 for time in times)


def test_an_infinite_rate_is_all_at_once():
    assert arrival_times(3, math.inf) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "kwargs", [{"rate": 0.0}, {"rate": -1.0}, {"rate": math.nan}, {"rate": 1.0, "burstiness": 0.0}]
)
def test_impossible_arrivals_are_refused(kwargs):
    with pytest.raises(ConfigError, match="must be above 0"):
        arrival_times(1, **kwargs)


def test_an_infinite_burstiness_is_a_clock():
    assert arrival_times(4, 2.0, burstiness=math.inf) == [0.5, 1.0, 1.5, 2.0]


def test_a_workload_says_what_of_it_is_left():
    """A report must not describe requests that were never sent."""
    requests = tuple(TraceRequest(100 * (i + 1), 10, float(i)) for i in range(5))
    whole = Workload("w", "5 requests of a file", requests)
    assert whole.adjusted(duration_seconds=9.0, max_prompt_tokens=500).description == "5 requests of a file"
    assert whole.adjusted(duration_seconds=2.0).description == "the first 2 of 5 requests of a file"
    cut = whole.adjusted(max_requests=3, max_prompt_tokens=150, max_output_tokens=4)
    assert cut.description == "the first 3 of 5 requests of a file, prompts cut to 150, outputs cut to 4"


@pytest.mark.parametrize(("first", "last"), [(2.0, 20.0), (20.0, 2.0)])
def test_a_ramp_has_the_rate_it_should_at_every_moment(first, last):
    """Counted in tenths of the ramp: each holds the requests of its own mean rate, within the noise of a count."""
    seconds = 1000.0
    times = arrival_times(11_000, first, ramp_to=last, ramp_seconds=seconds, seed=3)
    for tenth in range(10):
        expected = seconds / 10 * (first + (last - first) * (tenth + 0.5) / 10)
        counted = sum(tenth * 100 <= time < (tenth + 1) * 100 for time in times)
        assert abs(counted - expected) < 4 * math.sqrt(expected)


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.integers(1, 40))
def test_a_constant_ramp_follows_its_integral(first, last, count):
    """Request n arrives when the integral of the rate reaches n, and the last at the end of the ramp."""
    times = arrival_times(count, first, ramp_to=last, burstiness=math.inf)
    seconds = 2 * count / (first + last)
    for number, time in enumerate(times, 1):
        assert math.isclose(first * time + (last - first) / seconds * time**2 / 2, number, rel_tol=1e-9)
    assert math.isclose(times[-1], seconds, rel_tol=1e-9)


def test_a_ramp_between_infinities_is_refused():
    with pytest.raises(ConfigError, match="finite"):
        arrival_times(1, 1.0, ramp_to=math.inf)
