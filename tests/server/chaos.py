"""The engine process is killed again and again under load: ``python -m tests.server.chaos --kills 20 [--real]``.

Every request ends within five seconds, with the right answer or with a clear error; service resumes by itself; at the
end no process is left. ``--real`` runs a small model in torch, else the model takes no time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.server.served import Answer, Served, served, streamed, whole
from tests.server.test_supervisor import gone

LIMIT_SECONDS = 5.0


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    longest_seconds: float = 0.0  # from the start of a request to its end
    resumed_seconds: list[float] = field(default_factory=list)  # from each kill until requests are answered again
    engines: set[int] = field(default_factory=set)
    left_over: list[int] = field(default_factory=list)
    exit_status: int | None = None


class Chaos:
    def __init__(self, server: Served, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.report = Report(engines={server.engine_pid})
        self.expected: dict[str, str] = {}
        self.running = True
        self.max_tokens = 40

    async def run(self, kills: int, clients: int) -> Report:
        for number in range(8):
            prompt = f"request {number}"
            self.expected[prompt] = (await whole(self.server.http, prompt, self.max_tokens)).text
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(streamed if number % 2 else whole))
            for _ in range(kills):
                await asyncio.sleep(0.2 + 0.3 * self.random.random())
                await self._kill()
            await asyncio.sleep(0.3)
            self.running = False
        self.report.engines |= {child.pid for child in psutil.Process(self.server.process.pid).children()}
        self.server.signal()
        self.report.exit_status = await self.server.exit_status()
        await asyncio.sleep(0.1)
        self.report.left_over = [pid for pid in self.report.engines if not gone(pid)]
        return self.report

    async def _kill(self) -> None:
        """Kill it, in any state it may be in, and see that requests are answered again."""
        (engine,) = psutil.Process(self.server.process.pid).children()
        self.report.engines.add(engine.pid)
        engine.send_signal(signal.SIGKILL)
        killed = time.perf_counter()
        if self.random.random() < 0.2:  # and the next one while it starts
            await asyncio.sleep(0.3)
            for child in psutil.Process(self.server.process.pid).children():
                self.report.engines.add(child.pid)
                os.kill(child.pid, signal.SIGKILL)
        while time.perf_counter() - killed < 60:
            answer = await whole(self.server.http, "request 0", self.max_tokens)
            if answer.status == 200:
                self.report.resumed_seconds.append(time.perf_counter() - killed)
                return
            await asyncio.sleep(0.05)
        self.report.wrong.append("service did not resume within a minute")

    async def _client(self, ask: Any) -> None:
        while self.running:
            prompt = self.random.choice(list(self.expected))
            started = time.perf_counter()
            try:
                answer = await asyncio.wait_for(ask(self.server.http, prompt, self.max_tokens), LIMIT_SECONDS)
            except TimeoutError:
                self.report.wrong.append(f"no answer within {LIMIT_SECONDS:g} s")
                continue
            except httpx.HTTPError as error:
                self.report.wrong.append(f"the connection broke: {error!r}")
                continue
            self.report.longest_seconds = max(self.report.longest_seconds, time.perf_counter() - started)
            self.report.outcomes[self._judge(prompt, answer)] += 1
            if answer.error is not None:
                await asyncio.sleep(0.05)

    def _judge(self, prompt: str, answer: Answer) -> str:
        if answer.error is None:
            if not answer.done or answer.text != self.expected[prompt]:
                self.report.wrong.append(f"{prompt!r} gave {answer.text!r}, not {self.expected[prompt]!r}")
            return "answered"
        if answer.done or not self.expected[prompt].startswith(answer.text):
            self.report.wrong.append(f"{prompt!r}: {answer}")
        clear = "send it again" in answer.error["message"] or "try again" in answer.error["message"]
        if not clear or answer.status not in (200, 503):
            self.report.wrong.append(f"an error that is not clear: {answer}")
        return "broken off with an error" if answer.status == 200 else "refused with 503"


async def chaos(kills: int, *, clients: int = 12, real: bool = False, seed: int = 0) -> Report:
    small: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "kv_cache_bytes": 4 << 20, "num_threads": 1}
    async with served(step_seconds=0.002, command=() if real else None, **(small if real else {})) as server:
        return await Chaos(server, seed).run(kills, clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = asyncio.run(chaos(args.kills, clients=args.clients, real=args.real, seed=args.seed))
    for line in report.wrong[:20]:
        print(f"  WRONG {line[:500]}")
    resumed = sorted(report.resumed_seconds)
    summary = {
        "bench": "chaos", "kills": args.kills, "real": args.real, "outcomes": dict(report.outcomes),
        "wrong": len(report.wrong), "longest_seconds": report.longest_seconds,
        "resumed_median_seconds": resumed[len(resumed) // 2], "resumed_worst_seconds": resumed[-1],
        "engines": len(report.engines), "left_over": report.left_over, "exit_status": report.exit_status,
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
