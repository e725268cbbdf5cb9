"""Mixed load on a whole server for as long as one likes: ``python -m tests.server.soak --seconds 1800``.

Clients that read, read slowly, leave, ask for too much, send damaged bodies or no HTTP at all. Every answer to a
sound request is compared with the one that the same request got when the server was quiet: nothing may be lost,
doubled or mixed up. At the end the server must stand as it stood at the beginning: KV blocks, tasks, file
descriptors, memory.
The last line is JSON. ``--rate`` bounds the requests per second, for machines that have other work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.server.served import KEY, Served, body, served, streamed, whole
from tests.server.tiny import CONTEXT

WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on")
LENGTHS = (1, 5, 24)
KV_BYTES = 2 << 20  # tight: requests wait, and some are preempted
MAX_BODY_BYTES = 256 << 10
RSS_BAR_BYTES_PER_1000 = 1e6


@dataclass
class Report:
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # what must not happen, in words
    samples: list[tuple[int, int]] = field(default_factory=list)  # (requests so far, RSS of both processes in bytes)
    leaks: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        return self.outcomes.total()

    @property
    def rss_bytes_per_1000(self) -> float:
        """Theil–Sen slope over the second half of the run: outliers do not count."""
        half = [s for s in self.samples if s[0] >= self.requests / 2]
        step = max(1, len(half) // 200)
        points = half[::step]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] > a[0]]
        return 1000 * statistics.median(slopes) if slopes else 0.0


class Soak:
    def __init__(self, server: Served, seed: int, rate: float) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.rate = rate
        self.report = Report()
        self.prompts = [" ".join(self.random.choices(WORDS, k=k)) for k in (1, 3, 8, 20, 40) for _ in range(4)]
        self.expected: dict[tuple[str, int], str] = {}
        self._next_start = 0.0

    async def learn(self) -> None:
        """What each sound request is answered when it is alone."""
        for prompt in self.prompts:
            longest = await whole(self.server.http, prompt, max(LENGTHS))
            for length in LENGTHS:
                answer = await whole(self.server.http, prompt, length)
                assert answer.status == 200, answer.error
                assert longest.text.startswith(answer.text.rstrip("\ufffd"))
                self.expected[prompt, length] = answer.text

    def pick(self) -> tuple[str, int]:
        return self.random.choice(self.prompts), self.random.choice(LENGTHS)

    def judge(self, kind: str, answer: Any, key: tuple[str, int]) -> str:
        if answer.error is not None:
            if answer.status not in (429, 503, 408):
                self.report.wrong.append(f"{kind}: {answer.status} {answer.error}")
            return f"{kind} {answer.status}"
        if not answer.done or answer.text != self.expected[key]:
            self.report.wrong.append(f"{kind}: {key} gave {answer.text!r}, not {self.expected[key]!r}")
        return f"{kind} ok"

    # -- kinds of client ----------------------------------------------------------------------------

    async def reads_a_stream(self) -> str:
        key = self.pick()
        return self.judge("stream", await streamed(self.server.http, *key), key)

    async def waits_for_all(self) -> str:
        key = self.pick()
        return self.judge("whole", await whole(self.server.http, *key), key)

    async def wants_much(self) -> str:
        prompt, length = self.pick()
        more = {"n": 3, "best_of": None, "logprobs": 5, "temperature": 0.9, "seed": 3}
        response = await self.server.http.post("/v1/completions", json={**body(prompt, length), **more})
        if response.status_code == 200:
            choices = response.json()["choices"]
            if [c["index"] for c in choices] != [0, 1, 2] or any(
                len(c["logprobs"]["tokens"]) != length for c in choices
            ):
                self.report.wrong.append(f"n=3 gave {[c['logprobs'] for c in choices]}")
        elif response.status_code not in (429, 503, 408):
            self.report.wrong.append(f"n=3: {response.status_code} {response.text}")
        return f"much {response.status_code}"

    async def leaves(self) -> str:
        prompt, _ = self.pick()
        events = self.random.randrange(4)
        request = body(prompt, 300, stream=True)
        async with self.server.http.stream("POST", "/v1/completions", json=request) as response:
            async for _ in response.aiter_lines():
                events -= 1
                if events < 0:
                    break
        return "left"

    async def leaves_before_an_answer(self) -> str:
        task = asyncio.create_task(whole(self.server.http, self.pick()[0], 300))
        await asyncio.sleep(self.random.random() * 0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "left early"

    async def reads_slowly(self) -> str:
        key = self.random.choice(self.prompts), max(LENGTHS)
        reader, writer = await self._send(body(*key, stream=True), limit=256)
        text = b""
        while data := await reader.read(200):
            text += data
            await asyncio.sleep(0.02)
        writer.close()
        if b" 200 " in text[:20] and b"[DONE]" not in text:
            self.report.wrong.append(f"a slow reader got no end: {text[-300:]!r}")
        return "slow"

    async def has_a_deadline(self) -> str:
        response = await self.server.http.post(
            "/v1/completions", json=body(self.pick()[0], 300, timeout_seconds=0.02)
        )
        if response.status_code not in (200, 429, 503, 408):
            self.report.wrong.append(f"deadline: {response.status_code} {response.text}")
        return f"deadline {response.status_code}"

    async def asks_for_too_much(self) -> str:
        prompt = "x" * self.random.choice((CONTEXT + 1, 50_000, 2 * MAX_BODY_BYTES))
        response = await self.server.http.post("/v1/completions", json=body(prompt, 5))
        if response.status_code not in (400, 413):
            self.report.wrong.append(f"a huge prompt: {response.status_code} {response.text}")
        return f"huge {response.status_code}"

    async def fills_the_context(self) -> str:
        prompt = "y" * (CONTEXT - 8)
        response = await self.server.http.post("/v1/completions", json=body(prompt, 4))
        if response.status_code not in (200, 429, 503, 408):
            self.report.wrong.append(f"a full context: {response.status_code} {response.text}")
        return f"full {response.status_code}"

    async def sends_a_damaged_body(self) -> str:
        content = bytearray(json.dumps(body(*self.pick())).encode())
        for _ in range(self.random.randrange(1, 5)):
            content[self.random.randrange(len(content))] = self.random.randrange(256)
        content = content[: self.random.randrange(len(content))] if self.random.random() < 0.3 else content
        headers = {"content-type": "application/json"}
        response = await self.server.http.post("/v1/completions", content=bytes(content), headers=headers)
        if response.status_code not in (200, 400, 404, 413, 422, 429):
            self.report.wrong.append(f"damaged {bytes(content)!r}: {response.status_code} {response.text}")
        return f"damaged {response.status_code}"

    async def sends_no_http(self) -> str:
        reader, writer = await asyncio.open_connection(*self._address())
        writer.write(self.random.randbytes(self.random.randrange(1, 2000)) + b"\r\n\r\n")
        await asyncio.wait_for(reader.read(1 << 16), 20)
        writer.close()
        return "no http"

    async def breaks_off_its_body(self) -> str:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"
        )
        _, writer = await asyncio.open_connection(*self._address())
        writer.write(head + f'Authorization: Bearer {KEY}\r\n\r\n{{"model": "m"'.encode())
        await writer.drain()
        writer.transport.abort()
        return "broke off"

    async def looks_around(self) -> str:
        for path in ("/health", "/metrics", "/v1/models"):
            response = await self.server.http.get(path)
            if response.status_code != 200:
                self.report.wrong.append(f"{path}: {response.status_code}")
        return "looked"

    def _address(self) -> tuple[str, int]:
        url = httpx.URL(self.server.url)
        assert url.port is not None
        return url.host, url.port

    async def _send(self, request: Any, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        content = json.dumps(request).encode()
        reader, writer = await asyncio.open_connection(*self._address(), limit=limit)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        return reader, writer

    # -- the run ------------------------------------------------------------------------------------

    async def run(self, seconds: float, clients: int) -> Report:
        await self.learn()
        loop, report = asyncio.get_running_loop(), self.report
        await self.standing()
        started = self._next_start = loop.time()
        before = None
        end = started + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(end))
            while loop.time() < end:
                await asyncio.sleep(min(1.0, seconds / 40))
                report.samples.append((report.requests, self._rss()))
                if before is None and loop.time() > started + seconds / 4:
                    before = self._processes()
        report.seconds = loop.time() - started
        report.leaks = {"tasks": await self.standing(), **self._processes(), "before": before}
        return report

    async def _client(self, end: float) -> None:
        loop = asyncio.get_running_loop()
        kinds: list[tuple[Callable[[], Awaitable[str]], int]] = [
            (self.reads_a_stream, 30), (self.waits_for_all, 20), (self.wants_much, 5), (self.leaves, 10),
            (self.leaves_before_an_answer, 5), (self.reads_slowly, 1), (self.has_a_deadline, 4),
            (self.asks_for_too_much, 4), (self.fills_the_context, 2), (self.sends_a_damaged_body, 8),
            (self.sends_no_http, 4), (self.breaks_off_its_body, 4), (self.looks_around, 3),
        ]  # fmt: skip
        while loop.time() < end:
            self._next_start = max(self._next_start + 1 / self.rate, loop.time() - 1)
            await asyncio.sleep(self._next_start - loop.time())
            kind = self.random.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
            try:
                outcome = await kind()
            except (OSError, httpx.HTTPError) as error:
                outcome = f"{kind.__name__} failed"
                self.report.wrong.append(f"{kind.__name__}: {error!r}")
            self.report.outcomes[outcome] += 1

    async def standing(self) -> int:
        """Tasks of the idle server, once nothing is left of any request; TimeoutError if something stays."""
        async with asyncio.timeout(30):
            while True:
                stats = (await self.server.http.get("/admin/stats")).json()["stats"]
                if not any(stats[name] for name in ("requests", "kv_blocks_held", "waiting", "unfinished")):
                    return await self.server.num_tasks()
                await asyncio.sleep(0.1)

    def _processes(self) -> dict[str, Any]:
        both = psutil.Process(self.server.process.pid), psutil.Process(self.server.engine_pid)
        return {"fds": [p.num_fds() for p in both], "threads": [p.num_threads() for p in both]}

    def _rss(self) -> int:
        pids = self.server.process.pid, self.server.engine_pid
        return sum(psutil.Process(pid).memory_info().rss for pid in pids)


async def soak(seconds: float, *, clients: int = 24, seed: int = 0, rate: float = 1e9) -> Report:
    """The whole campaign on a server of its own; what is wrong is in the report."""
    async with served(
        command=(), config={"max_queue": 40, "max_body_bytes": MAX_BODY_BYTES}, load_format="dummy", dtype="float32",
        kv_cache_bytes=KV_BYTES, max_num_seqs=8, max_num_batched_tokens=256, num_threads=1,
    ) as server:  # fmt: skip
        idle = server.http
        first = Soak(server, seed, rate)
        tasks, files = await server.num_tasks(), open_files(server)
        report = await first.run(seconds, clients)
        await idle.aclose()  # kept-alive connections go
        report.leaks["tasks"] -= tasks
        async with asyncio.timeout(30):  # fds of the server fall back to what they were without clients
            while (open_now := connections(server)) > 0:
                await asyncio.sleep(0.1)
        report.leaks["connections"] = open_now
        report.leaks["files"] = open_files(server) - files
        server.signal()
        report.leaks["exit_status"] = await server.exit_status()
        return report


def connections(server: Served) -> int:
    """Established TCP connections of the HTTP process."""
    listed = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED for c in listed)


def open_files(server: Served) -> int:
    """File descriptors of the HTTP process but for its connections."""
    return psutil.Process(server.process.pid).num_fds() - connections(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.time()
    report = asyncio.run(soak(args.seconds, clients=args.clients, seed=args.seed, rate=args.rate))
    for outcome, count in sorted(report.outcomes.items()):
        print(f"  {outcome:24} {count}")
    for line in report.wrong[:20]:
        print(f"  WRONG {line[:500]}")
    summary = {
        "bench": "soak", "seconds": round(time.time() - started), "requests": report.requests,
        "wrong": len(report.wrong), "rss_mb_per_1000_requests": report.rss_bytes_per_1000 / 1e6,
        "rss_mb": [s[1] / 1e6 for s in report.samples[:: max(1, len(report.samples) // 8)]], "leaks": report.leaks,
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
