"""What the load generator itself costs, and so how much load one core of it can make.

Theory: the CPU time to parse a chunk that is in memory already. Measurement: the CPU time of the generator's thread
for each chunk that comes over loopback, one segment each, from a server in another process; beside it the same with
httpx, round by round. Then one JSON line.

    python bench/load_generator.py [--users 64] [--tokens 128] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from contextlib import closing
from typing import Any, ClassVar

import httpx

from foretell.loadgen.drive import Driver, Pace, run_loop
from foretell.loadgen.http import HttpClient
from foretell.loadgen.interface import Interface
from foretell.loadgen.prompts import PromptMaker
from foretell.loadgen.stream import StreamReader
from foretell.loadgen.target import Target
from foretell.trace import TraceRequest, Workload

CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"canned",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Canned(asyncio.Protocol):
    """Answers every request with so many chunks, one for each turn of the server's clock."""

    running: ClassVar[set[Canned]] = set()

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.left = 0
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self.received = b""
            self.transport.write(HEAD)
            self.left = self.tokens
            Canned.running.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        Canned.running.discard(self)

    def step(self) -> None:
        self.left -= 1
        if self.left >= 0:
            self.transport.write(framed(CHUNK))
            return
        self.transport.write(framed(DONE) + b"0\r\n\r\n")
        Canned.running.discard(self)


def serve(port: Any, tokens: int, step_seconds: float) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Canned(tokens), "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        while True:
            await asyncio.sleep(step_seconds)
            for connection in tuple(Canned.running):
                connection.step()

    run_loop(main())


def parsing_seconds(tokens: int) -> float:
    """Per chunk, from memory: the floor."""
    samples = []
    for _ in range(50):
        reader = StreamReader()
        started = time.thread_time()
        for _ in range(tokens):
            reader.push(CHUNK, 0.0)
        samples.append((time.thread_time() - started) / tokens)
    return statistics.median(samples)


def ours(url: str, requests: int, users: int, tokens: int) -> tuple[float, float]:
    """CPU seconds per chunk, and chunks per second of the run."""
    workload = Workload("canned", "", tuple(TraceRequest(32, tokens) for _ in range(requests)))

    async def main() -> Any:
        with closing(HttpClient(Target.parse(url))) as client:
            pace = Pace(closed=True, max_concurrency=users)
            return await Driver(
                client, Interface("completions", "m"), PromptMaker(workload), pace, advance=None
            ).run()

    run = run_loop(main())
    chunks = sum(len(sent.reader.token_times) for sent in run.sent)
    assert chunks == requests * tokens, run.errors()
    return run.cpu_seconds / chunks, chunks / run.wall_seconds


def with_httpx(url: str, requests: int, users: int, tokens: int) -> tuple[float, float]:
    body = json.loads(Interface("completions", "m").body("word " * 32, tokens))

    async def main() -> tuple[float, float]:
        limits = httpx.Limits(max_connections=users)
        left = iter(range(requests))
        chunks = 0

        async def user(client: httpx.AsyncClient) -> None:
            nonlocal chunks
            for _ in left:
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            chunks += bool(json.loads(line[6:])["choices"][0]["text"])

        async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
            cpu, wall = time.thread_time(), time.monotonic()
            await asyncio.gather(*(user(client) for _ in range(users)))
            return (time.thread_time() - cpu) / chunks, chunks / (time.monotonic() - wall)

    return run_loop(main())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--users", type=int, default=64)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--requests", type=int, default=512)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--step-ms", type=float, default=10.0, help="of the server: a token for every user")
    asked = options.parse_args()
    floor = parsing_seconds(asked.tokens)
    print(f"theory: {1e6 * floor:.2f} µs to parse a chunk that is in memory")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(sender, asked.tokens, asked.step_ms / 1e3), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{receiver.recv()}"
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "httpx": []}
    try:
        for _ in range(asked.rounds):
            for name, run in (("ours", ours), ("httpx", with_httpx)):
                found[name].append(run(url, asked.requests, asked.users, asked.tokens))
    finally:
        server.terminate()
        server.join()
    cost = {name: statistics.median(cpu for cpu, _ in rounds) for name, rounds in found.items()}
    rate = {name: statistics.median(rate for _, rate in rounds) for name, rounds in found.items()}
    for name in found:
        print(
            f"{name:6} {1e6 * cost[name]:6.1f} µs of CPU per chunk: one core takes {1 / cost[name]:,.0f} chunks/s "
            f"(measured at {rate[name]:,.0f}/s)"
        )
    ratio = statistics.median(b[0] / a[0] for a, b in zip(found["ours"], found["httpx"], strict=True))
    print(f"httpx costs {ratio:.1f} times as much")
    print(
        json.dumps(
            {
                "bench": "load_generator", "users": asked.users, "tokens": asked.tokens, "rounds": asked.rounds,
                "floor_seconds_per_chunk": floor, "seconds_per_chunk": cost["ours"],
                "chunks_per_second_per_core": 1 / cost["ours"], "httpx_seconds_per_chunk": cost["httpx"],
                "httpx_over_ours": ratio,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
