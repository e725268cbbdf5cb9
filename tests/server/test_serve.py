"""``foretell serve`` as its users meet it: starting, draining, ending, and refusing what is unsafe."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from foretell.cli.app import app
from foretell.errors import ConfigError
from foretell.server.run import listen
from tests.server.instant import expected_text, run, until
from tests.server.served import Answer, Served, served, streamed, whole
from tests.server.test_supervisor import gone
from tests.server.tiny import tiny_folder

LONG = 200_000


async def started(server: Served, prompt: str, max_tokens: int) -> asyncio.Task[Answer]:
    """A stream whose request the engine has."""
    task = asyncio.create_task(streamed(server.http, prompt, max_tokens))
    await until_running(server, 1)
    return task


async def until_running(server: Served, count: int) -> None:
    async with asyncio.timeout(20):
        while f"running {count}" not in await running(server):
            await asyncio.sleep(0.01)


async def running(server: Served) -> str:
    lines = (await server.http.get("/metrics")).text.splitlines()
    value = next(line.split()[-1] for line in lines if "num_requests_running" in line and not line.startswith("#"))
    return f"running {float(value):.0f}"


async def knock_until_closed(url: str) -> None:
    async with asyncio.timeout(5):
        while True:
            async with httpx.AsyncClient() as newcomer:
                await newcomer.get(url + "/health")


def test_sigterm_lets_what_is_under_way_finish_and_takes_no_more() -> None:
    async def scenario() -> None:
        async with served(step_seconds=0.005) as server:
            assert (await whole(server.http, "ab", 5)).text == expected_text("ab", 5)
            stream = await started(server, "xy", 300)
            server.signal()
            with pytest.raises(httpx.ConnectError):
                await knock_until_closed(server.url)
            answer = await stream
            assert (answer.text, answer.finish_reason, answer.done) == (expected_text("xy", 300), "length", True)
            assert await server.exit_status() == 0
            await until(lambda: gone(server.engine_pid), 5)

    run(scenario)


def test_the_drain_ends_with_an_error_for_those_who_take_too_long() -> None:
    async def scenario() -> None:
        async with served(step_seconds=0.002, drain_seconds=0.3) as server:
            stream = await started(server, "ab", LONG)
            server.signal(signal.SIGINT)
            answer = await stream
            assert answer.text
            assert not answer.done
            assert answer.error is not None
            assert "shutting down" in answer.error["message"]
            assert await server.exit_status() == 0

    run(scenario)


def test_a_second_signal_ends_at_once() -> None:
    async def scenario() -> None:
        async with served(step_seconds=0.002, drain_seconds=60) as server:
            stream = await started(server, "ab", LONG)
            server.signal()
            await asyncio.sleep(0.05)
            server.signal()
            assert await server.exit_status(5) == 128 + signal.SIGTERM
            await until(lambda: gone(server.engine_pid), 5)
            stream.cancel()
            await asyncio.gather(stream, return_exceptions=True)

    run(scenario)


def test_sigkill_of_the_server_leaves_no_engine() -> None:
    async def scenario() -> None:
        async with served(step_seconds=0.002) as server:
            stream = await started(server, "ab", LONG)
            server.signal(signal.SIGKILL)
            await server.exit_status()
            await until(lambda: gone(server.engine_pid), 5)
            with pytest.raises(httpx.RemoteProtocolError):
                await stream

    run(scenario)


def test_a_client_that_leaves_is_forgotten() -> None:
    """Generation does not go on after the client left (llama.cpp#24496), over real sockets."""

    async def scenario() -> None:
        async with served(step_seconds=0.002) as server:
            tasks = [await started(server, "ab", LONG)]
            tasks.append(asyncio.create_task(whole(server.http, "xy", LONG)))
            await until_running(server, 2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until_running(server, 0)
            assert (await whole(server.http, "ab", 5)).text == expected_text("ab", 5)

    run(scenario)


def test_a_killed_engine_is_an_error_event_without_done_and_then_it_works_again() -> None:
    async def scenario() -> None:
        async with served(step_seconds=0.002) as server:
            stream = await started(server, "ab", LONG)
            answer_due = asyncio.create_task(whole(server.http, "xy", LONG))
            await until_running(server, 2)
            os.kill(server.engine_pid, signal.SIGKILL)
            answer = await stream
            assert answer.text
            assert not answer.done
            assert answer.error is not None
            assert "died while it worked" in answer.error["message"]
            late = await answer_due
            assert late.status == 503
            async with asyncio.timeout(20):
                while (await server.http.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
            assert (await server.http.get("/health")).status_code == 200
            assert (await whole(server.http, "ab", 5)).text == expected_text("ab", 5)

    run(scenario)


# -- the command line -------------------------------------------------------------------------------


def failing(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1, "one line"
    return result.output


def test_other_interfaces_need_a_key() -> None:
    """Binding to all interfaces without a key."""
    assert "without a key would let anyone in" in failing(str(tiny_folder()), "--host", "0.0.0.0")


def test_an_unknown_model_is_one_line() -> None:
    assert "no-such-model" in failing("no-such-model", "--offline")


def test_a_port_in_use_is_one_line_and_found_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert "something listens there already" in failing(str(tiny_folder()), "--port", str(port))


def test_a_model_without_weights_is_one_line() -> None:
    assert "no weights" in failing(str(tiny_folder()), "--port", "0")


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="give another --host"), listen("no.such.host.invalid", 0):
        pass


@pytest.mark.parametrize(
    ("content", "why"), [(None, "cannot be read"), (b"\n \n", "is empty"), (b"\xff\xfe", "read")]
)
def test_key_files(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    assert why in failing(str(tiny_folder()), "--api-key-file", str(path))
