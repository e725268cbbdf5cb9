"""Chaos and soak, short enough for every run; the long ones are ``slow``, or run their modules by hand."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.chaos import LIMIT_SECONDS, chaos
from tests.server.soak import RSS_BAR_BYTES_PER_1000, soak


def check_chaos(kills: int, real: bool) -> None:
    report = asyncio.run(chaos(kills, real=real))
    assert not report.wrong
    assert report.longest_seconds < LIMIT_SECONDS
    assert len(report.resumed_seconds) == kills
    assert len(report.engines) > kills
    assert not report.left_over, "orphan processes"
    assert report.exit_status == 0
    assert report.outcomes["answered"] > 0


def test_the_engine_is_killed_under_load() -> None:
    check_chaos(2, real=False)


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True], ids=["instant", "real"])
def test_the_engine_is_killed_twenty_times_under_load(real: bool) -> None:
    check_chaos(20, real)


def check_soak(seconds: float) -> float:
    """What holds for any length; returns the growth of memory, bytes per 1,000 requests."""
    report = asyncio.run(soak(seconds))
    assert not report.wrong
    leaks = report.leaks
    assert leaks["tasks"] == 0
    assert leaks["exit_status"] == 0
    assert leaks["fds"][1] <= leaks["before"]["fds"][1], "the engine keeps file descriptors"
    assert leaks["connections"] == 0
    assert leaks["files"] <= 0, "the server keeps file descriptors"
    assert report.outcomes["stream ok"] > 10
    assert report.outcomes["whole ok"] > 10
    return report.rss_bytes_per_1000


def test_mixed_load_loses_nothing_and_leaks_nothing() -> None:
    check_soak(3)


@pytest.mark.slow
def test_two_minutes_of_mixed_load_do_not_grow() -> None:
    """Host memory leaks (vllm#50150)."""
    assert check_soak(120) < RSS_BAR_BYTES_PER_1000
