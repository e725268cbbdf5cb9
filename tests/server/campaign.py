"""Sends hostile requests over real sockets and judges the answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from random import Random

from tests.server.hostile import hostile, http, is_http

ANSWER_SECONDS = 60.0
OWN_FAULT = (500, 501, 502, 505)


class Campaign:
    """``counts`` by status ("closed": no answer); ``faults`` are answers that must not be."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.random = Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self, requests: int, at_once: int = 16) -> None:
        gate = asyncio.Semaphore(at_once)

        async def one(request: bytes) -> None:
            async with gate:
                await self._judge(request)

        for start in range(0, requests, 1000):
            batch = [hostile(self.random) for _ in range(min(1000, requests - start))]
            await asyncio.gather(*(one(request) for request in batch))

    async def _judge(self, request: bytes) -> None:
        answer = await self.send(request)
        if answer.startswith(b"HTTP/1.1 100 "):  # "go on": the answer itself comes behind it
            answer = answer.partition(b"\r\n\r\n")[2]
        status = answer[9:12].decode("ascii", "replace") if answer.startswith(b"HTTP/1.1 ") else "closed"
        self.counts[status] += 1
        if status == "closed":
            if is_http(request):
                self.faults.append(f"no answer to {request[:400]!r}")
        elif int(status) in OWN_FAULT:
            self.faults.append(f"{status} to {request[:400]!r}: {answer[-300:]!r}")
        elif int(status) >= 400 and b"application/json" in answer.partition(b"\r\n\r\n")[0].lower():
            self._check_shape(request, answer)

    def _check_shape(self, request: bytes, answer: bytes) -> None:
        body = answer.partition(b"\r\n\r\n")[2]
        if request.startswith(b"HEAD") or len(body) > 60_000:
            return
        try:
            error = json.loads(body.split(b"HTTP/1.1 ")[0])["error"]
            if not error["message"] or not error["type"] or "\n" in error["message"]:
                raise ValueError(error)
        except (ValueError, KeyError) as why:
            self.faults.append(f"an error without its shape ({why}): {body[:200]!r} to {request[:200]!r}")

    async def send(self, request: bytes) -> bytes:
        """Everything that comes back until the other side closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head, cut, rest = request.partition(b"\r\n\r\n")
            writer.write(head + b"\r\nconnection: close" + cut + rest if cut else request)
            if not is_http(request):
                writer.write_eof()  # nobody waits for the rest of what is cut short
            async with asyncio.timeout(ANSWER_SECONDS):
                return await reader.read()
        except ConnectionError:
            return b""
        except TimeoutError:
            self.faults.append(f"nothing for {ANSWER_SECONDS:g} s after {request[:400]!r}")
            return b""
        finally:
            writer.close()

    async def still_answers(self) -> str:
        """The text of a plain greedy completion."""
        body = json.dumps({"prompt": "Hello", "max_tokens": 8, "temperature": 0}).encode()
        answer = await self.send(http("POST", "/v1/completions", body))
        text: str = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
        return text
