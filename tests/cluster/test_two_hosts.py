"""Two hosts, one link: an instance across both, two replicas, the link cut under load, replicas by queue depth.

Own command: ``make cluster-test``. Every request ends with the whole right answer or with an error that says what to
do; service comes back by itself; no process is left on either host. Each test prints a JSON line of what it took.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.hosts import CONTROL, ENGINE, HERE, OTHER, OURS, PLACER, RANK, RAY, TwoHosts, possible, two_hosts
from tests.server.served import Answer, streamed, whole
from tests.server.tiny import tiny_folder

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
KEY, CLIENTS, MAX_TOKENS = "a-key-for-tests", 6, 60
LIMIT_SECONDS = 30.0  # no request is silent for longer; the link's end is noticed after five
BACK_SECONDS = 120.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    if reason := possible():
        pytest.skip(reason)
    with two_hosts() as found:
        yield found


@asynccontextmanager
async def serving(hosts: TwoHosts, *options: str) -> AsyncIterator[httpx.AsyncClient]:
    """``foretell serve --cluster`` on the head; at the end nothing of it is left on any host."""
    command = hosts.command(
        hosts.head, sys.executable, "-m", "foretell.cli", "serve", str(tiny_folder()), "--cluster", "auto",
        "--load-format", "dummy", "--dtype", "float32", "--kv-cache-bytes", "4MiB", "--served-model-name", "m",
        "--host", CONTROL, "--port", "8123", "--api-key", KEY, "--drain-seconds", "5", *options,
    )  # fmt: skip
    log = hosts.folder / "serve.log"
    environment = {**os.environ, **RAY, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "RAY_TMPDIR": str(hosts.folder)}
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)
    headers, url = {"authorization": f"Bearer {KEY}"}, f"http://{CONTROL}:8123"
    transport = httpx.AsyncHTTPTransport(local_address=HERE)
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, transport=transport) as http:
            await until(lambda: server.poll() is not None or b"/v1" in log.read_bytes(), 90)
            assert server.poll() is None, log.read_text()
            yield http
            server.terminate()
            await until(lambda: server.poll() is not None, 30)
            assert server.returncode == 0, log.read_text()[-2000:]
    except BaseException:
        print("\n".join([line for line in log.read_text().splitlines() if "POST /v1" not in line][-40:]))
        raise
    finally:
        server.kill()
        server.wait()
    await until(lambda: not (hosts.processes(hosts.head, *OURS) + hosts.processes(hosts.other, *OURS)), 20)


async def until(condition: Callable[[], Any], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.05)


class Load:
    """Clients that ask the same questions again and again; what they are told is judged at once."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.expected: dict[str, str] = {}
        self.ends: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.longest_seconds = 0.0
        self.last_answer = 0.0
        self.stopping = False

    async def learn(self) -> None:
        for number in range(8):
            prompt = f"request {number}"
            answer = await whole(self.http, prompt, MAX_TOKENS)
            assert answer.error is None
            self.expected[prompt] = answer.text

    async def ask(self, number: int) -> None:
        turn = number
        while not self.stopping:
            turn += 1
            prompt = f"request {turn % 8}"
            started = time.monotonic()
            async with asyncio.timeout(LIMIT_SECONDS):
                answer = await (streamed if number % 2 else whole)(self.http, prompt, MAX_TOKENS)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)
            self.ends[self.judge(prompt, answer)] += 1
            if answer.error is not None:
                await asyncio.sleep(0.1)

    def judge(self, prompt: str, answer: Answer) -> str:
        if answer.error is None:
            assert answer.done
            assert answer.text == self.expected[prompt]
            self.last_answer = time.monotonic()
            return "answered"
        assert not answer.done
        assert self.expected[prompt].startswith(answer.text)
        message = str(answer.error["message"])
        assert "send it again" in message or "try again" in message, answer
        self.messages[message] += 1
        return "broken off" if answer.status == 200 else "refused"

    @asynccontextmanager
    async def running(self, clients: int = CLIENTS) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self.ask(number))
            try:
                yield
            finally:
                self.stopping = True

    async def answers(self, count: int, seconds: float) -> None:
        """So many more."""
        wanted = self.ends["answered"] + count
        await until(lambda: self.ends["answered"] >= wanted, seconds)


async def stats(http: httpx.AsyncClient) -> dict[str, Any]:
    response = await http.get("/admin/stats")
    return dict(response.json()["stats"])


async def replicas_running(http: httpx.AsyncClient, count: int, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while [one["state"] for one in (await stats(http))["replicas"]] != ["running"] * count:
            await asyncio.sleep(0.2)


async def wait_for_two(hosts: TwoHosts) -> None:
    """Both Ray nodes are there."""
    command = hosts.command(
        hosts.head, sys.executable, "-m", "foretell.cli", "cluster", "plan", "--replicas", "2", "--cluster", "auto"
    )
    environment = {**os.environ, **RAY, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "RAY_TMPDIR": str(hosts.folder)}
    async with asyncio.timeout(90):
        while (await asyncio.to_thread(subprocess.run, command, capture_output=True, env=environment)).returncode:
            await asyncio.sleep(0.5)


def report(name: str, load: Load, **more: Any) -> None:
    figures = {"test": name, "ends": dict(load.ends), "longest_seconds": round(load.longest_seconds, 2), **more}
    print(json.dumps(figures))


def test_an_instance_across_both_hosts_survives_a_cut(hosts: TwoHosts) -> None:
    async def scenario() -> None:
        await wait_for_two(hosts)
        async with serving(hosts, "--pp", "2") as http:
            load = Load(http)
            await load.learn()
            (one,) = (await stats(http))["replicas"]
            assert OTHER in one["host"]
            async with load.running():
                await load.answers(3 * CLIENTS, 30)
                hosts.cut()
                cut = time.monotonic()
                await until(lambda: load.messages, LIMIT_SECONDS)
                noticed = time.monotonic() - cut
                # what is cut off ends by itself: it could not be told to
                await until(lambda: not hosts.processes(hosts.other, *OURS), 20)
                gone = time.monotonic() - cut
                hosts.mend()
                mended = time.monotonic()
                await load.answers(3 * CLIENTS, BACK_SECONDS)
                back = time.monotonic() - mended
            assert any(f"of host {OTHER}" in message for message in load.messages), load.messages
            assert (await stats(http))["restarts"] >= 1
        report(
            "an instance across both", load, noticed_seconds=round(noticed, 2), left_over_seconds=round(gone, 2),
            back_seconds=round(back, 2), messages=dict(load.messages),
        )  # fmt: skip

    asyncio.run(scenario())


def test_two_replicas_lose_one_host_and_go_on(hosts: TwoHosts) -> None:
    async def scenario() -> None:
        await wait_for_two(hosts)
        async with serving(hosts, "--replicas", "2") as http:
            load = Load(http)
            await load.learn()
            assert len({one["host"] for one in (await stats(http))["replicas"]}) == 2
            async with load.running():
                await load.answers(3 * CLIENTS, 30)
                hosts.cut()
                cut = time.monotonic()
                while time.monotonic() - cut < 15:
                    await load.answers(CLIENTS, LIMIT_SECONDS)  # the other one goes on
                states = sorted(one["state"] for one in (await stats(http))["replicas"])
                assert states == ["restarting", "running"]
                assert (await http.get("/health")).status_code == 200
                hosts.mend()
                mended = time.monotonic()
                await replicas_running(http, 2, BACK_SECONDS)
                back = time.monotonic() - mended
                await load.answers(3 * CLIENTS, 30)
            # what had not begun was tried on the other one; what had, whole or streamed, is told to be sent again
            assert all("send it again" in message for message in load.messages), load.messages
            figures = await stats(http)
            assert figures["generation_tokens"] >= MAX_TOKENS * load.ends["answered"]
            text = (await http.get("/metrics")).text
            assert f'replica_up{{host="{OTHER}"' in text.replace("foretell:", "")
        report("two replicas", load, back_seconds=round(back, 2), messages=dict(load.messages))

    asyncio.run(scenario())


def test_whatever_is_killed_comes_back(hosts: TwoHosts) -> None:
    """A rank and the engine on either host, and the one process that speaks with Ray, whose slots end with it."""

    async def scenario() -> None:
        await wait_for_two(hosts)
        back: dict[str, float] = {}
        async with serving(hosts, "--pp", "2") as http:
            load = Load(http)
            await load.learn()
            async with load.running():
                for host, module in ((hosts.other, RANK), (hosts.head, ENGINE), (hosts.head, PLACER)):
                    await load.answers(2 * CLIENTS, BACK_SECONDS)
                    (victim,) = hosts.processes(host, module)
                    known = load.messages.total()
                    victim.kill()
                    killed = time.monotonic()
                    await until(lambda known=known: load.messages.total() > known, LIMIT_SECONDS)
                    await load.answers(2 * CLIENTS, BACK_SECONDS)
                    back[module.rsplit(".", 1)[1]] = round(time.monotonic() - killed, 2)
            assert (await stats(http))["restarts"] == 3
        report("whatever is killed", load, back_seconds=back, messages=dict(load.messages))

    asyncio.run(scenario())


def test_replicas_follow_the_queue(hosts: TwoHosts) -> None:
    async def scenario() -> None:
        await wait_for_two(hosts)
        scaling = ["--max-replicas", "2", "--scale-up-seconds", "1", "--scale-down-seconds", "2"]
        async with serving(hosts, *scaling, "--max-num-seqs", "2") as http:
            load = Load(http)
            await load.learn()
            await replicas_running(http, 1, 10)
            async with load.running(12):
                started = time.monotonic()
                await replicas_running(http, 2, 60)
                up = time.monotonic() - started
                await load.answers(50, 60)
            idle = time.monotonic()
            await replicas_running(http, 1, 30)
            down = time.monotonic() - idle
            assert load.ends["refused"] == load.ends["broken off"] == 0
        report("scaling", load, up_seconds=round(up, 2), down_seconds=round(down, 2))

    asyncio.run(scenario())
