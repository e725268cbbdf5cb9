"""Child processes that never outlive their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PARENT_VARIABLE = "FORETELL_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def start_child(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Run ``command`` with the number of its end of a socket pair as last argument; returns (process, our end).

    Call it from a thread that lives as long as the child may: Linux counts the death of that thread as the parent's.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=child_environment(),
            )
    except BaseException:
        ours.close()
        raise
    return process, ours


def child_environment() -> dict[str, str]:
    """Ours, and what lets a child find this very package, however it came to be importable here, and its parent."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), PARENT_VARIABLE: str(os.getpid())}


def python_module(name: str) -> list[str]:
    """The command that runs a module with this interpreter; the working directory has no say in what is imported."""
    return [sys.executable, "-P", "-m", name]


def die_with_parent() -> None:
    """In a child of ``start_child``: where the kernel can (Linux), the parent's death ends this process too."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):  # it died before
        os._exit(1)
