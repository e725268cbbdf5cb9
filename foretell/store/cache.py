"""Where fetched models live, and the two things every writer there needs: a lock and an atomic rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from foretell.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRUE: Final = {"1", "true", "yes", "on"}


def cache_home(cache_dir: Path | None = None) -> Path:
    """``cache_dir``, else $FORETELL_HOME, else $XDG_CACHE_HOME/foretell, else ~/.cache/foretell."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if home := os.environ.get("FORETELL_HOME"):
        return Path(home).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "foretell"
    return Path.home() / ".cache" / "foretell"


def is_offline(offline: bool | None = None) -> bool:
    """The argument when given, else whether $FORETELL_OFFLINE or $HF_HUB_OFFLINE is set to a true value."""
    if offline is not None:
        return offline
    return any(os.environ.get(key, "").lower() in _TRUE for key in ("FORETELL_OFFLINE", "HF_HUB_OFFLINE"))


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file ``path``; a second process waits. The kernel frees it however we die."""
    make_folder(path.parent)
    try:
        file = path.open("ab")
    except OSError as error:
        raise storage_error(error, path.parent, 0) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fetches {what} …", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_folder(path: Path) -> None:
    """Creates ``path`` and its parents. DownloadError when the cache cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path, 0) from None


def publish(temporary: Path, target: Path) -> None:
    """Makes ``temporary`` durable and gives it its final name in one step: readers see all of it or nothing."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def storage_error(error: OSError, folder: Path, needed_bytes: int) -> DownloadError:
    """The one-line error for a failed write into ``folder``; ``needed_bytes`` is what was still to be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"disk full: {megabytes(needed_bytes)} more are needed in {folder}; free some space or point "
            "FORETELL_HOME at another disk, then run again (what is there is kept)"
        )
    return DownloadError(
        f"cannot write to {folder}: {error.strerror or error}; make it writable or point FORETELL_HOME elsewhere"
    )


def megabytes(count: int) -> str:
    """``count`` bytes for people: "98.4 MB"."""
    return f"{count / 1e6:,.1f} MB"
