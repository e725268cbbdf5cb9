"""Building the C++ kernels: what happens without a compiler, with a bad one, and in a foreign directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foretell.errors import ConfigError
from foretell.kernels import cpu_build, get_kernels


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of its own, empty; the library that other tests use is loaded again afterwards."""
    monkeypatch.setenv("FORETELL_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FORETELL_KERNELS", raising=False)
    cpu_build.load_library.cache_clear()
    yield tmp_path
    cpu_build.load_library.cache_clear()


def reason() -> str:
    kernels = get_kernels("auto")
    assert kernels.name == "reference"
    with pytest.raises(ConfigError, match="cpu kernels cannot be used"):
        get_kernels("cpu")
    assert "\n" not in kernels.reason
    return kernels.reason


def test_without_a_compiler(home, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in reason()


def test_with_a_failing_compiler(home, monkeypatch):
    compiler = home / "broken"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cpu.cpp:1: error: no luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "no luck" in reason()


def test_in_a_directory_of_another_user(home, monkeypatch):
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert "belongs to another user" in reason()


def test_a_library_that_is_not_ours_is_refused(home, monkeypatch):
    monkeypatch.setattr(cpu_build, "_fingerprint", lambda *_: "planted")
    directory = home / "kernels"
    directory.mkdir(mode=0o700)
    (directory / "planted.so").symlink_to("/bin/sh")
    assert "not a file of ours" in reason()


def test_an_unwritable_home(monkeypatch, home):
    monkeypatch.setenv("FORETELL_HOME", "/proc/nowhere")
    assert "failed" in reason()


@pytest.mark.slow  # it compiles everything once more
def test_the_cache_is_private_and_used_again(home):
    try:
        get_kernels("cpu")
    except ConfigError as error:
        pytest.skip(str(error))
    directory = home / "kernels"
    (library,) = directory.iterdir()
    assert directory.stat().st_mode & 0o077 == 0
    built = library.stat().st_mtime_ns
    cpu_build.load_library.cache_clear()
    get_kernels("cpu")
    assert library.stat().st_mtime_ns == built


def test_the_environment_forces_the_reference(monkeypatch):
    monkeypatch.setenv("FORETELL_KERNELS", "reference")
    assert get_kernels().name == "reference"


def test_unknown_name():
    with pytest.raises(ConfigError, match="choose auto, cuda, cpu or reference"):
        get_kernels("cuda3")


def test_the_library_brings_no_thread_runtime_of_its_own():
    """Only torch's OpenMP may be there: two would each keep a pool spinning for the same cores."""
    code = (
        "import torch\nfrom pathlib import Path\nfrom foretell.kernels import get_kernels\n"
        "k = get_kernels()\nk.pack_linear(torch.ones(4096, 64), None)(torch.ones(64, 64)); torch.ones(10**6).exp()\n"
        "maps = Path('/proc/self/maps').read_text().split()\n"
        "names = {Path(word).name for word in maps if word.startswith('/')}\n"
        "print(k.name, sum(n.startswith(('libgomp', 'libomp', 'libiomp')) for n in names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, runtimes = done.stdout.split()
    if name != "cpu":
        pytest.skip("no C++ kernels here")
    assert int(runtimes) <= 1


POOL = """
import os, sys, threading, torch
from foretell.kernels.cpu import CpuKernels
k = CpuKernels(); k.set_threads(4)
x, w = torch.randn(33, 512), torch.randn(700, 512)
linear = k.pack_linear(w, None)
k.set_threads(1); expected = linear(x); k.set_threads(4)
wrong = []
def work():
    for i in range(400):
        if not torch.equal(linear(x), expected): wrong.append(i)
threads = [threading.Thread(target=work) for _ in range(5)]
[t.start() for t in threads]; [t.join() for t in threads]
pid = os.fork()
if pid == 0:
    work(); os._exit(1 if wrong else 0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child of a fork computed wrongly"
assert not wrong, wrong
print("same")
"""


def test_the_pool_under_several_callers_more_threads_than_cores_and_after_a_fork():
    pytest.importorskip("foretell.kernels.cpu")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", POOL], capture_output=True, text=True, timeout=120)
    if "BuildError" in done.stderr:
        pytest.skip("no C++ kernels here")
    assert done.stdout.strip() == "same", done.stderr
