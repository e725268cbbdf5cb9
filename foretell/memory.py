"""How much memory there is to take, and how much is taken."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

DEFAULT_KV_SHARE = 0.3  # of the memory that is free when the engine starts


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: what the machine and, in a container, the control group leave."""
    limits = [int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)]
    machine = _fields(Path("/proc/meminfo")).get("MemAvailable:")
    if machine is not None:
        limits = [machine * 1024]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        reclaimable = _fields(group / "memory.stat").get("inactive_file", 0)
        limits.append(max(0, limit - used + reclaimable))
    return min(limits)


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name number …"; empty if there is no such file."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def default_kv_bytes() -> int:
    return int(available_memory_bytes() * DEFAULT_KV_SHARE)


def resident_bytes() -> int:
    """Memory of this process alone, without mapped files, after giving back what is free; 0 where nobody tells."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return 0
