"""An engine process whose model takes no time, behind the real client: what the runtime's tests stand on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from foretell.assembly import EngineOptions
from foretell.core.params import SamplingParams
from foretell.executor.instant import first_token
from foretell.server.engine_client import EngineClient
from foretell.server.supervisor import Watch
from foretell.tracking import Update
from tests.server.tiny import tiny_folder

SCRIPT = Path(__file__).parents[2] / "bench" / "instant_engine.py"
NUM_IDS = 94
QUICK = Watch(ping_seconds=0.05, first_pause_seconds=0.05)


def instant_command(step_seconds: float = 0.0) -> list[str]:
    return [sys.executable, str(SCRIPT), str(step_seconds)]


@asynccontextmanager
async def instant_engine(*, step_seconds: float = 0.0, **options: Any) -> AsyncIterator[EngineClient]:
    client_options = {name: options.pop(name) for name in ("max_queue", "watch", "command") if name in options}
    client = EngineClient(
        EngineOptions(str(tiny_folder()), **options),
        **{"watch": QUICK, "command": instant_command(step_seconds), **client_options},
    )
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def expected_text(prompt: str, max_tokens: int) -> str:
    """What the instant engine answers: printable ASCII, beginning where the prompt says."""
    alphabet = [chr(c) for c in range(33, 127)]
    ids = [c - 33 if 33 <= c < 127 else SPACE if c == 32 else None for c in prompt.encode()]
    assert None not in ids, "plain ASCII, please"
    start = first_token([i for i in ids if i is not None], NUM_IDS)
    return "".join(alphabet[(start + i) % NUM_IDS] for i in range(max_tokens))


SPACE = 220  # its place in the byte-level alphabet


async def collect(client: EngineClient, prompt: Any, max_tokens: int = 8, **options: Any) -> list[Update]:
    own = {name: options.pop(name) for name in ("priority", "timeout_seconds") if name in options}
    params = SamplingParams(max_tokens=max_tokens, **options)
    return [update async for update in client.stream(prompt, params, **own)]


async def text_of(client: EngineClient, prompt: str, max_tokens: int = 8, **options: Any) -> str:
    return "".join(u.delta_text for u in await collect(client, prompt, max_tokens, **options))


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def until_idle(client: EngineClient, seconds: float = 20.0) -> dict[str, Any]:
    """The engine's own figures once nothing is left of any request; TimeoutError if something stays."""
    async with asyncio.timeout(seconds):
        while True:
            figures: dict[str, Any] = await client.control("stats")
            if not (figures["requests"] or figures["kv_blocks_held"] or figures["waiting"]):
                return figures
            await asyncio.sleep(0.005)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]
