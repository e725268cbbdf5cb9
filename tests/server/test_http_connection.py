"""Connections that want nothing but to be there."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from foretell.server.http_connection import MAX_HEAD_BYTES, HttpConnection
from foretell.server.run import OWN_FILES, max_connections

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Impatient(HttpConnection):
    head_seconds = 0.2


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connection(protocol: type[HttpConnection] = Impatient) -> AsyncIterator[Ends]:
    config = uvicorn.Config(hello, lifespan="off", log_config=None, access_log=False, timeout_keep_alive=600)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        try:
            yield reader, writer
        finally:
            writer.close()
            await writer.wait_closed()


def answers(*sent: bytes, protocol: type[HttpConnection] = Impatient) -> bytes:
    """All that comes until the server closes the connection."""

    async def scenario() -> bytes:
        async with asyncio.timeout(20), connection(protocol) as (reader, writer):
            got = b""
            for number, data in enumerate(sent):
                writer.write(data)
                await writer.drain()
                if number < len(sent) - 1:
                    got += await reader.readuntil(b"hello")
            return got + await reader.read()

    return asyncio.run(scenario())


def test_silence_is_ended() -> None:
    assert answers(b"").startswith(b"HTTP/1.1 408")


def test_half_a_head_is_ended() -> None:
    assert answers(GET[:-2]).startswith(b"HTTP/1.1 408")


def test_half_a_second_head_is_ended_too() -> None:
    got = answers(GET, GET[:10])
    assert got.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in got


def test_noise_after_an_answer_does_not_keep_a_connection() -> None:
    assert b"HTTP/1.1 408" in answers(GET, b"\r\n")


def test_headers_without_end_are_refused() -> None:
    many = b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(MAX_HEAD_BYTES // 8))
    assert answers(many, protocol=HttpConnection).startswith(b"HTTP/1.1 431")


def test_sound_requests_come_one_after_the_other() -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20), connection() as (reader, writer):
            for _ in range(3):
                writer.write(GET)
                assert b"200 OK" in await reader.readuntil(b"hello")
                await asyncio.sleep(0.15)  # longer, all together, than a head may take
            body = b"x" * (2 * MAX_HEAD_BYTES)
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in await reader.readuntil(b"hello")

    asyncio.run(scenario())


def test_there_are_files_left_when_connections_are_refused() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        limit = max_connections()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft >= before[0]
        assert limit == max(64, soft - OWN_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
