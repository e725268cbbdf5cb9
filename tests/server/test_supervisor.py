"""Whatever becomes of the engine process: everybody hears of it, another one takes over, none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from foretell.assembly import EngineOptions
from foretell.core.params import SamplingParams
from foretell.errors import ForetellError, UnavailableError
from foretell.server.engine_client import EngineClient
from foretell.server.supervisor import Watch
from tests.server.instant import QUICK, collect, expected_text, instant_engine, run, text_of, until
from tests.server.tiny import tiny_folder

FOR_EVER = 200_000


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def pid_of(client: EngineClient) -> int:
    await until(lambda: client.is_ready)
    assert client.supervisor.pid is not None
    return client.supervisor.pid


def test_a_killed_engine_is_replaced_and_nobody_waits_for_ever() -> None:
    """Twice under load; the campaign of twenty is test_chaos."""

    async def scenario() -> None:
        async with instant_engine(step_seconds=0.001) as client:
            for kill in range(2):
                pid = await pid_of(client)
                before = dict(client.stats())
                lost = [asyncio.create_task(collect(client, "ab", FOR_EVER)) for _ in range(8)]
                calls = [asyncio.create_task(text_of(client, f"{i}", 5)) for i in range(8)]
                assert await asyncio.gather(*calls) == [expected_text(f"{i}", 5) for i in range(8)]
                os.kill(pid, signal.SIGKILL)
                async with asyncio.timeout(5):
                    results = await asyncio.gather(*lost, return_exceptions=True)
                assert all(isinstance(r, UnavailableError) for r in results)
                assert "died while it worked on this request" in str(results[0])
                assert results[0] is not results[1]
                assert not client.is_ready
                assert not client.is_healthy
                with pytest.raises(UnavailableError, match="restarting"):
                    await text_of(client, "ab")
                assert await pid_of(client) != pid
                assert gone(pid)
                assert client.is_healthy
                assert await text_of(client, "ab") == expected_text("ab", 8)
                stats = client.stats()
                assert stats["restarts"] == kill + 1
                assert stats["generation_tokens"] >= before["generation_tokens"], "counters only grow"
                assert stats["unfinished"] == 0

    run(scenario)


def test_an_admin_command_under_way_is_told_too() -> None:
    async def scenario() -> None:
        async with instant_engine() as client:
            pid = await pid_of(client)
            os.kill(pid, signal.SIGSTOP)
            call = asyncio.create_task(client.control("stats"))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(UnavailableError):
                await call

    run(scenario)


def test_health_turns_red_in_a_long_silence_and_a_hung_engine_is_replaced() -> None:
    """Workers hang while /health says 200 (vllm#8058, #40926): not here."""

    async def scenario() -> None:
        watch = Watch(ping_seconds=0.02, stall_seconds=0.5, hang_seconds=1.5, first_pause_seconds=0.05)
        async with instant_engine(watch=watch) as client:
            pid = await pid_of(client)
            await asyncio.sleep(0.8)
            assert client.is_healthy, "an idle engine answers"
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: not client.is_healthy)
            assert client.is_running, "not yet given up"
            with pytest.raises(UnavailableError, match="hung"):
                await text_of(client, "ab")
            assert await pid_of(client) != pid
            assert gone(pid)

    run(scenario)


def test_a_start_that_fails_says_why_and_leaves_nothing() -> None:
    async def scenario() -> None:
        children = len(psutil.Process().children())
        client = EngineClient(EngineOptions(str(tiny_folder())))  # no weights in there, and load_format is not dummy
        with pytest.raises(ForetellError, match="no weights"):
            await client.start()
        assert not client.is_ready
        assert not client.is_healthy
        await client.close()
        assert len(psutil.Process().children()) == children

    run(scenario)


DIES = "import sys; sys.exit(3)"
FLAKY = """
import pathlib, runpy, sys
count = pathlib.Path(sys.argv[1])
starts = int(count.read_text() or 0) + 1
count.write_text(str(starts))
if 1 < starts < 5:
    sys.exit(1)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_engine_that_dies_while_it_starts_is_an_error_and_no_wait() -> None:
    async def scenario() -> None:
        client = EngineClient(EngineOptions(str(tiny_folder())), command=[sys.executable, "-c", DIES])
        with pytest.raises(UnavailableError, match="died while it started"):
            await client.start()

    run(scenario)


def test_restarts_that_fail_are_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        from tests.server.instant import SCRIPT

        (tmp_path / "starts").write_text("")
        command = [sys.executable, "-c", FLAKY, str(tmp_path / "starts"), str(SCRIPT)]
        watch = Watch(ping_seconds=0.05, first_pause_seconds=0.01, longest_pause_seconds=0.02)
        async with instant_engine(command=command, watch=watch) as client:
            os.kill(await pid_of(client), signal.SIGKILL)
            await until(lambda: not client.is_ready)
            await pid_of(client)
            assert (tmp_path / "starts").read_text() == "5"
            assert await text_of(client, "ab") == expected_text("ab", 8)

    run(scenario)


def test_a_switched_policy_outlives_the_engine() -> None:
    async def scenario() -> None:
        async with instant_engine() as client:
            await client.control("set_policy", name="prefill-first")
            os.kill(await pid_of(client), signal.SIGKILL)
            await until(lambda: not client.is_ready)
            await pid_of(client)
            assert (await client.control("stats"))["policy"] == "prefill-first"

    run(scenario)


def test_nothing_is_left_of_an_engine_or_its_requests() -> None:
    """File descriptors, tasks, processes: as many after as before."""

    async def scenario() -> None:
        me = psutil.Process()

        async def once() -> None:
            async with instant_engine() as client:
                stream = client.stream("ab", SamplingParams(max_tokens=FOR_EVER))
                await anext(stream)
                os.kill(await pid_of(client), signal.SIGKILL)
                with pytest.raises(UnavailableError):
                    async for _ in stream:
                        pass
                await pid_of(client)
                await text_of(client, "ab")

        await once()  # what is made once stays: thread pools, for one
        before = (me.num_fds(), len(asyncio.all_tasks()), len(me.children()))
        await once()
        assert (me.num_fds(), len(asyncio.all_tasks()), len(me.children())) == before

    run(scenario)


PARENT = """
import asyncio, sys
from foretell.assembly import EngineOptions
from foretell.core.params import SamplingParams
from foretell.server.engine_client import EngineClient
async def main():
    client = EngineClient(EngineOptions(sys.argv[1]), command=sys.argv[2:])
    await client.start()
    stream = client.stream("ab", SamplingParams(max_tokens=200_000))
    await anext(stream)
    print(client.supervisor.pid, flush=True)
    async for _ in stream:
        pass
asyncio.run(main())
"""


@pytest.mark.parametrize("step_seconds", [0.0, 600.0], ids=["busy", "in a long step"])
def test_a_killed_parent_leaves_no_child(step_seconds: float) -> None:
    """Orphan workers (vllm#55510). The engine is in the middle of a step, or of one that takes very long."""

    async def scenario() -> None:
        from tests.server.instant import instant_command

        if step_seconds:
            command = [sys.executable, "-c", SLOW_SECOND_STEP, *instant_command()[1:2]]
        else:
            command = instant_command()
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PARENT, str(tiny_folder()), *command, stdout=asyncio.subprocess.PIPE
        )
        assert parent.stdout is not None
        async with asyncio.timeout(20):
            child = int(await parent.stdout.readline())
        assert not gone(child)
        parent.send_signal(signal.SIGKILL)
        await parent.wait()
        await until(lambda: gone(child), 5)

    run(scenario)


SLOW_SECOND_STEP = """
import runpy, sys, time
from foretell.executor import instant
run = instant.InstantRunner.execute
def execute(self, batch):
    if not batch.added:
        time.sleep(600)
    return run(self, batch)
instant.InstantRunner.execute = execute
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

assert QUICK.hang_seconds > 60, "slow machines must not look like hung engines to the other tests"
