"""What serving costs beside the model: tokens per second of an HTTP core, added TTFT, the engine loop's share.

    python bench/server_overhead.py [--concurrent 32] [--max-tokens 256] [--model smollm2-135m]

The model is replaced by one that takes no time (``instant_engine.py``), or a fixed time per step, so that what is
measured is everything else: HTTP, JSON, tokenising, messages, scheduling, detokenising, events. Processor seconds of
the HTTP process are counted, not those of the clock: other work on the machine, the client's own and the engine's
included, moves them little. The last part runs a real model and asks how much of its time the engine process spends
between two steps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
TOKENS_PER_SECOND_BAR, TTFT_BAR_SECONDS, OUTSIDE_BAR = 3000, 0.005, 0.05
PROMPT = "Tell me, in a few words, what a language model does between two of its tokens. " * 3
SERVE = """
import sys
from foretell.assembly import EngineOptions
from foretell.server.config import ServerConfig
from foretell.server.run import serve
options = EngineOptions(sys.argv[2], max_num_seqs=64, kv_cache_bytes=int(sys.argv[3]) or None)
keys = ("a-key-for-the-bench",)
config = ServerConfig(port=int(sys.argv[1]), api_keys=keys)
more = {"command": sys.argv[4:]} if sys.argv[4:] else {}
sys.exit(serve(options, config, on_ready=lambda client, url: print(client.supervisor.pid, flush=True), **more))
"""
KEY = "a-key-for-the-bench"


@dataclass
class Served:
    """A server in a process of its own."""

    port: int
    http: psutil.Process
    engine: psutil.Process

    def http_seconds(self) -> float:
        """Processor time of the HTTP process so far."""
        times = self.http.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def server(model: str, command: Sequence[str] = (), kv_bytes: int = 0) -> Iterator[Served]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [sys.executable, "-c", SERVE, str(port), model, str(kv_bytes), *command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        try:
            yield Served(port, psutil.Process(process.pid), psutil.Process(int(line)))
        finally:
            process.send_signal(signal.SIGTERM)


@dataclass
class Stream:
    """One streamed completion as its client saw it; seconds from the request's first byte."""

    ttft_seconds: float = 0.0
    events: int = 0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)


async def complete(port: int, max_tokens: int, prompt: str = PROMPT) -> Stream:
    """A client that costs as little as can be: one connection, one request, events counted and not parsed."""
    body = json.dumps(
        {
            "model": MODEL_NAME[0], "prompt": prompt, "stream": True, "temperature": 0, "ignore_eos": True,
            "max_tokens": max_tokens, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    result = Stream()
    started = last = time.perf_counter()
    writer.write(head.encode() + body)
    tail = b""
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        count = data.count(b"data: {")
        if count and not result.events:
            result.ttft_seconds = now - started
        result.events += count
        result.gaps.append(now - last)
        last = now
        tail = (tail + data)[-2000:]
    writer.close()
    if b"[DONE]" not in tail:
        raise SystemExit(f"a stream broke off: {tail[-300:]!r}")
    result.tokens = json.loads(tail[tail.rindex(b"data: {") + 6 :].split(b"\n", 1)[0])["usage"]["completion_tokens"]
    return result


MODEL_NAME = [""]


@contextlib.asynccontextmanager
async def background(port: int, streams: int, tokens: int) -> AsyncIterator[None]:
    """So many streams under way all the time."""

    async def again() -> None:
        while True:
            await complete(port, tokens)

    tasks = [asyncio.create_task(again()) for _ in range(streams)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def throughput(model: str, concurrent: int, max_tokens: int, step_seconds: float) -> dict[str, float]:
    """Streamed tokens per processor second of the HTTP process, and per second of the clock."""

    async def load(served: Served) -> dict[str, float]:
        await asyncio.gather(*(complete(served.port, 32) for _ in range(concurrent)))
        cpu, clock = served.http_seconds(), time.perf_counter()
        streams = await asyncio.gather(*(complete(served.port, max_tokens) for _ in range(concurrent)))
        cpu, clock = served.http_seconds() - cpu, time.perf_counter() - clock
        tokens, events = sum(s.tokens for s in streams), sum(s.events for s in streams)
        return {
            "tokens_per_core_second": tokens / cpu,
            "tokens_per_second": tokens / clock,
            "tokens_per_event": tokens / (events - concurrent),  # the last event of each is its usage
            "http_core_share": cpu / clock,
        }

    with server(model, [sys.executable, str(HERE / "instant_engine.py"), str(step_seconds)]) as served:
        return asyncio.run(load(served))


def added_ttft(model: str, concurrent: int, requests: int, step_seconds: float) -> dict[str, float]:
    """TTFT of requests that come one by one, at random moments, while ``concurrent`` - 1 others stream, less what the
    engine itself makes them wait: half a step on average until theirs begins, and their own."""

    async def load(served: Served) -> list[float]:
        times = []
        async with background(served.port, concurrent - 1, 400):
            await asyncio.sleep(0.5)
            for number in range(requests):
                await asyncio.sleep(step_seconds * (1 + number * 0.6180339887 % 1))
                times.append((await complete(served.port, 1, f"{number} {PROMPT}")).ttft_seconds)
        return times

    with server(model, [sys.executable, str(HERE / "instant_engine.py"), str(step_seconds)]) as served:
        times = asyncio.run(load(served))
    waits = 1.5 * step_seconds
    return {
        "added_ttft_seconds": statistics.mean(times) - waits,
        "added_ttft_median_seconds": statistics.median(times) - waits,
        "worst_ttft_seconds": max(times) - 2 * step_seconds,
    }


def outside_share(model: str, concurrent: int, max_tokens: int) -> dict[str, float]:
    """Of a real model's steps: the share of the engine's time between the end of one and the begin of the next."""

    async def run(streams: int) -> dict[str, float]:
        from foretell.assembly import EngineOptions
        from foretell.core.params import SamplingParams
        from foretell.server.engine_client import EngineClient

        client = EngineClient(EngineOptions(model, kv_cache_bytes=1 << 29))
        await client.start()

        async def one(number: int) -> None:
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
            async for _ in client.stream(f"{number} {PROMPT}", params):
                pass

        try:
            await one(0)
            await client.control("steps", keep=4096)
            await asyncio.gather(*(one(number) for number in range(streams)))
            records = [r for r in await client.control("steps", keep=0) if len(r["chunks"]) == streams]
        finally:
            await client.close()
        gaps = [b["started"] - a["finished"] for a, b in itertools.pairwise(records)]
        steps = [r["seconds"] for r in records[1:]]
        return {
            "step_seconds": statistics.median(steps),
            "gap_seconds": statistics.median(gaps),
            "outside_share": sum(gaps) / (sum(gaps) + sum(steps)),
            "outside_share_median": statistics.median(g / (g + s) for g, s in zip(gaps, steps, strict=True)),
        }

    return asyncio.run(run(concurrent))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=100, help="for TTFT")
    parser.add_argument("--step-seconds", type=float, default=0.02, help="of the paced model")
    parser.add_argument("--model", default="smollm2-135m", help="real model, whose tokenizer is used throughout")
    parser.add_argument("--skip-model", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    MODEL_NAME[0] = args.model
    n = args.concurrent
    print(f"floor: nothing. Bars: {TOKENS_PER_SECOND_BAR} tokens/s per HTTP core, {TTFT_BAR_SECONDS * 1e3:.0f} ms, "
          f"{OUTSIDE_BAR:.0%} of a step")  # fmt: skip
    results: dict[str, Any] = {}
    for name, step in (("paced", args.step_seconds), ("flat out", 0.0)):
        r = results[name] = throughput(args.model, n, args.max_tokens, step)
        print(f"{n} streams, {name:8}: {r['tokens_per_core_second']:7.0f} tokens per HTTP core second, "
              f"{r['tokens_per_second']:6.0f} per second of the clock; {r['tokens_per_event']:.2f} tokens per event, "
              f"HTTP process {r['http_core_share']:.0%} busy")  # fmt: skip
    r = results["ttft"] = added_ttft(args.model, n, args.requests, args.step_seconds)
    mean, median, worst = (
        1e3 * r[k] for k in ("added_ttft_seconds", "added_ttft_median_seconds", "worst_ttft_seconds")
    )
    print(f"TTFT added among {n} streams: mean {mean:.2f} ms, median {median:.2f} ms, worst {worst:.2f} ms")
    if not args.skip_model:
        for streams in (1, 16):
            r = results[f"engine, {streams}"] = outside_share(args.model, streams, 128)
            print(f"{args.model}, {streams:2} at once: step {r['step_seconds'] * 1e3:.2f} ms, between two "
                  f"{r['gap_seconds'] * 1e3:.3f} ms, share outside {r['outside_share']:.2%}")  # fmt: skip
    print(json.dumps({"bench": "server_overhead", **{k.replace(" ", "_"): v for k, v in results.items()}}))


if __name__ == "__main__":
    main()
