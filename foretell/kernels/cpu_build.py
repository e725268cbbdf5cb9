"""Compile the C++ kernels for this very CPU at first use and keep the result in the cache directory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from foretell.store.cache import cache_home

SOURCES = (
    "cpu_attention.h",
    "cpu_common.h",
    "cpu_elementwise.h",
    "cpu_linear.h",
    "cpu_pool.h",
    "cpu_quant.h",
    "cpu.cpp",
)
# No -ffast-math: results must not depend on how the compiler regroups sums. Contraction is off because the
# code says itself where a multiply and an add fuse.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
BUILD_SECONDS = 300


class BuildError(Exception):
    """Why there are no C++ kernels here, in one line."""


@cache
def load_library() -> ctypes.CDLL:
    """The compiled kernels, built if this machine has not built them yet; BuildError says why not."""
    if os.name != "posix":
        raise BuildError("the C++ kernels are built on Linux and macOS only")
    compiler = _find_compiler()
    try:
        directory = _private_directory(cache_home() / "kernels")
        return _load_or_build(compiler, directory)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"building the C++ kernels failed: {_one_line(str(error))}") from error


def _find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler (c++, g++ or clang++) is on PATH")


def _private_directory(path: Path) -> Path:
    """What is loaded from here runs as us: nobody else may be able to put it there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid():
        raise BuildError(f"{path} belongs to another user; set FORETELL_HOME to a directory of your own")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        path.chmod(0o700)
    return path


def _load_or_build(compiler: str, directory: Path) -> ctypes.CDLL:
    flags = (*FLAGS, _target_flag(), *os.environ.get("FORETELL_CXXFLAGS", "").split())
    library = directory / f"{_fingerprint(compiler, flags)}.so"
    if not library.exists() and (failure := _compile(compiler, flags, library)):
        raise BuildError(f"{compiler} cannot build the C++ kernels: {failure}")
    status = library.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISREG(status.st_mode):
        raise BuildError(f"{library} is not a file of ours; delete it")
    return ctypes.CDLL(str(library))


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> str | None:
    """None, or the compiler's complaint. The rename makes concurrent builders harmless."""
    source = Path(__file__).with_name("cpu.cpp")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        target = Path(scratch) / library.name
        command = [compiler, str(source), *flags, "-w", "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return _one_line(lines[0] if lines else f"exit status {done.returncode}")
        target.chmod(0o700)
        os.replace(target, library)
    return None


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=True).stdout
    digest.update(repr((version, flags, _cpu_model())).encode())
    return digest.hexdigest()[:24]


def _cpu_model() -> str:
    """-march=native means another thing on another CPU: home directories travel between machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    seen: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            seen.setdefault(key.strip(), value.strip())
    return f"{platform.machine()} {sorted(seen.items())}"


def _target_flag() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
