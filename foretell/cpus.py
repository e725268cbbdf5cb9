"""How many processors are ours."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """Those that this process may run on, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
