"""Ranks are killed and stopped under load: named, replaced, nobody's answer lost or doubled, no process left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from typing import Any

import psutil
import pytest

from foretell.assembly import EngineOptions
from foretell.core.params import SamplingParams
from foretell.errors import UnavailableError
from foretell.server.engine_client import EngineClient
from tests.server.instant import QUICK, run, until
from tests.server.tiny import tiny_folder

CLIENTS, MAX_TOKENS = 6, 40
NOTICED_SECONDS = 10.0


class Load:
    """Clients that ask the same questions again and again; the first answer to each is the right one."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.answers: dict[int, list[int]] = {}
        self.ends: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.stopping = False

    async def ask(self, number: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        while not self.stopping:
            tokens: list[int] = []
            try:
                async for update in self.client.stream([number + 1, 7, number + 3], params):
                    tokens += update.delta_token_ids
                    assert update.finish_reason in (None, "length"), update.output.outputs[0].error
            except UnavailableError as error:
                self.ends["refused"] += 1
                self.reasons.append(str(error))
                await asyncio.sleep(0.02)
                continue
            self.ends["answered"] += 1
            assert tokens == self.answers.setdefault(number, tokens)  # whole, once, and the same as ever
            assert len(tokens) == MAX_TOKENS


def family(client: EngineClient) -> list[psutil.Process]:
    """The engine process and its ranks."""
    engine = psutil.Process(int(client.stats()["engine_pid"]))
    return [engine, *engine.children()]


async def strike(
    client: EngineClient, load: Load, rng: random.Random, layout: int, number: signal.Signals
) -> dict[str, Any]:
    """One rank is hit at a random moment; what it took."""
    await asyncio.sleep(rng.random() * 0.5)
    processes = family(client)
    assert len(processes) == 1 + layout
    known, struck = len(load.reasons), time.monotonic()
    os.kill(rng.choice(processes[1:]).pid, number)
    await until(lambda: not client.is_running, NOTICED_SECONDS)
    noticed = time.monotonic() - struck
    await until(lambda: client.is_running, 120.0)
    answered = load.ends["answered"]
    await until(lambda: load.ends["answered"] >= answered + CLIENTS, 60.0)
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 5.0)
    assert not alive, "a process outlived its engine"
    assert any("rank " in reason for reason in load.reasons[known:]), load.reasons[known:]
    return {"signal": number.name, "noticed_seconds": noticed, "back_seconds": time.monotonic() - struck}


async def campaign(strikes: int, *, tp: int, pp: int, seed: int) -> list[dict[str, Any]]:
    options = EngineOptions(
        str(tiny_folder()), load_format="dummy", dtype="float32", kv_cache_bytes=4 << 20, num_threads=2, tp=tp, pp=pp
    )
    client = EngineClient(options, watch=QUICK)
    await client.start()
    load, rng = Load(client), random.Random(seed)
    try:
        clients = [asyncio.create_task(load.ask(number)) for number in range(CLIENTS)]
        await until(lambda: load.ends["answered"] >= CLIENTS, 60.0)
        signals = (signal.SIGKILL, signal.SIGSTOP)
        found = [await strike(client, load, rng, tp * pp, signals[i % 2]) for i in range(strikes)]
        load.stopping = True
        await asyncio.gather(*clients)
    finally:
        processes = family(client) if client.is_running else []
        await client.close()
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 5.0)
    assert not alive
    return found


@pytest.mark.slow
def test_a_rank_that_dies_under_load() -> None:
    async def scenario() -> None:
        (found,) = await campaign(1, tp=2, pp=1, seed=1)
        assert found["noticed_seconds"] < NOTICED_SECONDS

    run(scenario)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_twenty_five_strikes(tp: int, pp: int) -> None:
    async def scenario() -> None:
        found = await campaign(25, tp=tp, pp=pp, seed=tp)
        for name in ("SIGKILL", "SIGSTOP"):
            times = sorted(f["noticed_seconds"] for f in found if f["signal"] == name)
            print(f"{name}: {len(times)} strikes, noticed after {times[0]:.2f} to {times[-1]:.2f} s")
        print(f"back after {max(f['back_seconds'] for f in found):.1f} s at most")

    run(scenario)
