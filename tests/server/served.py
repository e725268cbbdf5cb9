"""A whole server in processes of its own, with an engine whose model takes no time."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.server.instant import instant_command
from tests.server.tiny import tiny_folder

KEY = "a-key-for-tests"
SCRIPT = """
import asyncio, json, signal, sys
from foretell.assembly import EngineOptions
from foretell.server.config import ServerConfig
from foretell.server.run import serve
from foretell.server.supervisor import Watch
settings = json.loads(sys.argv[1])
def ready(client, url):
    print(url, client.supervisor.pid, flush=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: print(len(asyncio.all_tasks()), flush=True))
sys.exit(serve(
    EngineOptions(settings["model"], **settings["engine"]),
    ServerConfig(port=0, api_keys=(settings["key"],), served_model_names=("m",), **settings["config"]),
    drain_seconds=settings["drain_seconds"],
    watch=Watch(ping_seconds=0.1, first_pause_seconds=0.05),
    on_ready=ready,
    **({"command": settings["command"]} if settings["command"] else {}),
))
"""


@dataclass
class Served:
    process: asyncio.subprocess.Process
    url: str
    engine_pid: int  # of the first engine
    http: httpx.AsyncClient

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    async def num_tasks(self) -> int:
        """Of the server's event loop."""
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout is not None
        return int(await asyncio.wait_for(self.process.stdout.readline(), 20))

    async def exit_status(self, seconds: float = 20.0) -> int:
        return await asyncio.wait_for(self.process.wait(), seconds)


@asynccontextmanager
async def served(
    *,
    step_seconds: float = 0.0,
    drain_seconds: float = 10.0,
    command: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
    model: str = "",
    timeout_seconds: float = 30.0,
    **engine: Any,
) -> AsyncIterator[Served]:
    settings = {
        "model": model or str(tiny_folder()), "key": KEY, "drain_seconds": drain_seconds, "engine": engine,
        "config": config or {}, "command": instant_command(step_seconds) if command is None else list(command),
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SCRIPT, json.dumps(settings), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 60)).split()
        assert line, "the server did not start"
        url = line[0].decode()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout_seconds, limits=limits) as http:
            yield Served(process, url, int(line[1]), http)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass
class Answer:
    """What came of one streamed completion."""

    text: str = ""
    finish_reason: str | None = None
    done: bool = False  # [DONE] came
    error: dict[str, Any] | None = None
    status: int = 0
    pieces: list[str] = field(default_factory=list)


def body(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


async def streamed(http: httpx.AsyncClient, prompt: str, max_tokens: int, **more: Any) -> Answer:
    answer = Answer()
    async with http.stream("POST", "/v1/completions", json=body(prompt, max_tokens, stream=True, **more)) as response:
        answer.status = response.status_code
        if response.status_code != 200:
            answer.error = json.loads(await response.aread())["error"]
            return answer
        async for line in response.aiter_lines():
            take(answer, line)
    return answer


def take(answer: Answer, line: str) -> None:
    """One line of an event stream."""
    if not line.startswith("data: "):
        return
    assert not answer.done, "something came after [DONE]"
    if line == "data: [DONE]":
        answer.done = True
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = event["error"]
        return
    for choice in event["choices"]:
        answer.text += choice["text"]
        answer.pieces.append(choice["text"])
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


async def whole(http: httpx.AsyncClient, prompt: str, max_tokens: int, **more: Any) -> Answer:
    response = await http.post("/v1/completions", json=body(prompt, max_tokens, **more))
    content = response.json()
    if response.status_code != 200:
        return Answer(error=content["error"], status=response.status_code)
    choice = content["choices"][0]
    return Answer(choice["text"], choice["finish_reason"], True, None, 200)
