"""The command as a process of its own: the default model by its alias, Ctrl-C, a reader that leaves, a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foretell.store import resolve
from tests.model.test_cli_run import KEYS, TINY

FORETELL = [sys.executable, "-m", "foretell.cli"]


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A run that takes minutes unless it is stopped: random weights, no end token, a long context."""
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 1 << 20}))
    options = ["--load-format", "dummy", "--kernels", "reference", "--kv-cache-bytes", "512MiB", "-n", "1000000"]
    return [*FORETELL, "run", str(tmp_path), "1,2,3", "--ids", *options]


def test_the_default_model_answers() -> None:
    command = [*FORETELL, "run", "The capital of France is", "--raw", "-n", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen.keys() >= KEYS
    assert "Paris" in seen["text"]
    assert seen["model"] == "smollm2-135m"
    assert seen["load_seconds"] == pytest.approx(sum(seen["phases"].values()))


def test_ctrl_c_is_one_line_and_130(endless: list[str]) -> None:
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == b"interrupted\n"


def test_a_reader_that_leaves_ends_the_run(endless: list[str]) -> None:
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(20)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    model = str(resolve("smollm2-135m").path)
    env = os.environ | {"TERM": "dumb", "FORETELL_HOME": str(tmp_path)}  # the line history goes there too
    # its home is empty: the C++ kernels would be built again
    command = [*FORETELL, "chat", model, "-n", "400", "--max-model-len", "512", "--kernels", "reference"]
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True
    ) as process:
        os.close(terminal)
        screen = read_until(main, b"> ", 240)
        os.write(main, b"Count from one to one hundred.\n")
        screen += read_until(main, b"Count from one to one hundred.\r\n", 60)
        screen += read_until(main, b" ", 60)
        process.send_signal(signal.SIGINT)
        screen += read_until(main, b"> ", 60)
        os.write(main, b"\x04")
        assert process.wait(60) == 0, screen
    assert b"(stopped" in screen
    assert "Count from" in (tmp_path / "chat_history").read_text()
    assert (tmp_path / "chat_history").stat().st_mode & 0o077 == 0
    assert b"Traceback" not in screen
    os.close(main)


def read_until(terminal: int, text: bytes, seconds: float) -> bytes:
    """What appears on the terminal up to ``text``."""
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(terminal, 1)
    return seen
