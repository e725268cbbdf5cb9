"""Whether a measurement was disturbed: how long this process's threads had to wait for a processor meanwhile.

Linux counts it of every thread, in nanoseconds (/proc/self/task/*/schedstat, the second number). A step whose threads
never waited took what it takes on an idle machine, but for caches and memory that others use. Elsewhere nothing is
known and every measurement counts as undisturbed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

TASKS = "/proc/self/task"
MOST_WAITED = 0.02  # of a measurement's seconds: more disturbs it


class Sample(NamedTuple):
    """Seconds of some things measured in turn, and the largest share of its time that one of them waited."""

    seconds: tuple[float, ...]
    waited: float

    @property
    def quiet(self) -> bool:
        return self.waited <= MOST_WAITED


def waited_seconds() -> float:
    """Of all threads of this process so far; 0 where the system does not say. Some 20 µs."""
    waited = 0
    try:
        for task in os.listdir(TASKS):
            waited += _waited_nanoseconds(task)
    except OSError:
        return 0.0
    return waited / 1e9


def _waited_nanoseconds(task: str) -> int:
    try:
        with open(f"{TASKS}/{task}/schedstat", "rb") as file:
            return int(file.read().split()[1])
    except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel keeps no such count
        return 0


def undisturbed(samples: Sequence[Sample], fewest: int) -> list[Sample]:
    """The quiet ones; where they are too few, the ``fewest`` that waited least."""
    quiet = [sample for sample in samples if sample.quiet]
    return quiet if len(quiet) >= fewest else sorted(samples, key=lambda sample: sample.waited)[:fewest]
