"""A rank that dies or hangs is named, nobody waits for ever, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import psutil
import pytest

from foretell import LLM, SamplingParams
from foretell.errors import ConfigError, ForetellError
from foretell.executor import parallel
from foretell.executor.parallel import ParallelExecutor
from tests.model import models

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "kv_cache_bytes": 4_000_000, "num_threads": 2}
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)


def open_two() -> tuple[LLM, ParallelExecutor]:
    llm = LLM(str(models.prepare("glassllm")), tp=2, **OPTIONS)
    executor = llm.assembly.engine.executor
    assert isinstance(executor, ParallelExecutor)
    return llm, executor


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "signal 9"), (signal.SIGSTOP, "silent")])
def test_a_lost_rank_is_named_and_the_others_end(
    number: signal.Signals, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "SILENT_SECONDS", 3.0)
    llm, executor = open_two()
    with llm:
        stream = llm.stream([1, 2, 3], LONG)
        next(stream)
        os.kill(executor.ranks[1].process.pid, number)
        with pytest.raises(ForetellError, match=r"rank 1 \(stage 0, shard 1\)") as caught:
            list(stream)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(ForetellError, match="the engine has stopped"):
            llm.generate([[1, 2]], LONG, progress=False)
    assert all(rank.process.poll() is not None for rank in executor.ranks)


def test_a_rank_lost_while_idle_is_noticed() -> None:
    llm, executor = open_two()
    with llm:
        executor.ranks[0].process.kill()
        executor.ranks[0].process.wait()
        llm.service._thread.join(10)  # the engine's thread finds out by itself
        with pytest.raises(ForetellError, match="rank 0"):
            llm.generate([[1, 2]], LONG, progress=False)


def test_a_rank_that_cannot_load_says_why() -> None:
    with pytest.raises(ConfigError, match="9 query heads do not divide over 2 ranks"):
        LLM(str(models.prepare("smollm2")), tp=2, **OPTIONS)


def test_ranks_die_with_their_driver() -> None:
    """SIGKILL of the driver, which then cannot tidy up."""
    script = textwrap.dedent(f"""
        import json, sys
        from foretell import LLM
        llm = LLM({str(models.prepare("glassllm"))!r}, pp=2, **{OPTIONS!r})
        print(json.dumps([rank.process.pid for rank in llm.assembly.engine.executor.ranks]), flush=True)
        sys.stdin.read()
    """)
    driver = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().strip(b"[]\n").split(b",")]
    ranks = [psutil.Process(pid) for pid in pids]
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
