"""Disturbed measurements are told from others, and none is lost where all are disturbed."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.cost.pace import Pace
from foretell.cost.quiet import MOST_WAITED, Sample, _waited_nanoseconds, undisturbed, waited_seconds

SHARES = st.floats(0, 1)


@given(st.lists(SHARES, min_size=1), st.integers(1, 5))
def test_quiet_samples_are_kept_and_the_rest_only_for_want_of_them(shares: list[float], fewest: int) -> None:
    samples = [Sample((float(number),), share) for number, share in enumerate(shares)]
    kept = undisturbed(samples, fewest)
    quiet = [sample for sample in samples if sample.waited <= MOST_WAITED]
    if len(quiet) >= fewest:
        assert kept == quiet
    else:
        assert len(kept) == min(fewest, len(samples))
        assert set(quiet) <= set(kept)
        left = [sample.waited for sample in samples if sample not in kept]
        assert max(sample.waited for sample in kept) <= min(left, default=1.0)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system does not count waiting")
def test_threads_that_share_one_processor_wait_for_each_other() -> None:
    cpus = os.sched_getaffinity(0)
    counted = [0, 0]

    def work(number: int) -> None:  # of the kernel's own, so that the interpreter's lock is no part of it
        os.sched_setaffinity(0, {min(cpus)})
        for _ in range(3):
            counted[number] += sum(os.urandom(6_000_000)[:1]) >= 0

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    own = whole = 0.0
    while any(thread.is_alive() for thread in threads):
        whole = max(whole, waited_seconds())
        own = max(own, sum(_waited_nanoseconds(str(thread.native_id)) for thread in threads))
        for thread in threads:
            thread.join(0.001)
    assert counted == [3, 3]
    assert (
        own > 0
    )  # of these two alone: other threads of the process may end meanwhile, and what they waited with them
    assert whole > 0


def test_a_slower_machine_is_taken_out_and_noise_is_not() -> None:
    looks = iter([1.0, 1.2, 1.01])
    pace = Pace(SimpleNamespace(reference_seconds=lambda: next(looks)), usual=1.0)  # type: ignore[arg-type]
    assert pace.steady(3.0, pace.look()) == 3.0
    assert pace.steady(3.0, pace.look()) == pytest.approx(2.5)
    assert pace.steady(3.0, pace.look()) == 3.0
    assert Pace(SimpleNamespace()).steady(3.0, 0.0) == 3.0  # type: ignore[arg-type]  # a device: no reference
