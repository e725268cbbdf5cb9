"""A small real HTTP server in a thread of its own: it does to each request what a test's script says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable


class Exchange:
    """One request in the hands of a script: write what should go back, or nothing."""

    def __init__(self, number, body, reader, writer):
        self.number = number  # from 0, POST requests alone
        self.body = body
        self.reader = reader
        self.writer = writer

    def head(self, status=200, content_type="text/event-stream", extra=""):
        self.writer.write(
            f"HTTP/1.1 {status} Status\r\nContent-Type: {content_type}\r\n"
            f"Transfer-Encoding: chunked\r\n{extra}\r\n".encode()
        )

    def chunk(self, data: bytes):
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, value):
        self.chunk(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")

    def token(self, text=" word"):
        self.event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})

    def end(self):
        self.writer.write(b"0\r\n\r\n")

    def answer(self, tokens=None, usage=True):
        """All at once: ``tokens`` pieces, the usage, [DONE]."""
        tokens = self.body["max_tokens"] if tokens is None else tokens
        self.head()
        for _ in range(tokens):
            self.token()
        if usage:
            self.event({"choices": [], "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens}})
        self.event(b"[DONE]")
        self.end()

    def refuse(self, status, message):
        body = json.dumps({"error": {"message": message}}).encode()
        self.head(status, "application/json")
        self.chunk(body)
        self.end()

    @property
    def prompt_tokens(self):
        """Two tokens per word and five more: what a probe has to find out."""
        prompt = self.body["prompt"] if "prompt" in self.body else self.body["messages"][0]["content"]
        return 2 * len(prompt.split()) + 5 if isinstance(prompt, str) else len(prompt)


Script = Callable[[Exchange], Awaitable[None] | None]


class ScriptedServer:
    """``with ScriptedServer(script) as url``. ``bodies`` keeps what was asked, ``most`` how much at once."""

    def __init__(self, script: Script = lambda exchange: exchange.answer(), models=("scripted",)):
        self.script = script
        self.models = models
        self.bodies = []
        self.heads = []
        self.open = self.most = 0
        self._ready = threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.thread.start()
        self._ready.wait()
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    async def _main(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.handlers = set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self.stop.wait()
        server.close()
        for handler in self.handlers:
            handler.cancel()
        await asyncio.gather(*self.handlers, return_exceptions=True)

    async def _serve(self, reader, writer):
        handler = asyncio.current_task()
        self.handlers.add(handler)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                length = next((int(x[15:]) for x in head.split("\r\n") if x.lower().startswith("content-length:")), 0)
                body = await reader.readexactly(length)
                await self._answer(head, body, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.handlers.discard(handler)
            writer.close()

    async def _answer(self, head, body, reader, writer):
        if head.startswith("GET"):
            data = json.dumps({"data": [{"id": name} for name in self.models]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            return
        exchange = Exchange(len(self.bodies), json.loads(body), reader, writer)
        self.bodies.append(exchange.body)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            waiting = self.script(exchange)
            if waiting is not None:
                await waiting
        finally:
            self.open -= 1
