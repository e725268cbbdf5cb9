"""One engine's process, and the connection to it: what it says, and whether it is still there."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from foretell.errors import ForetellError, UnavailableError
from foretell.server import wire


class EngineProcess(Protocol):
    """An engine's process, here or on another host, where no exit status can be had of it."""

    pid: int
    returncode: int | None

    def kill(self) -> None: ...

    def wait(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that was started, and the connection to it. ``options`` go over those of the engine; ``host``: which
    one it is on, "" for this."""

    process: EngineProcess
    sock: socket.socket
    options: dict[str, Any] = field(default_factory=dict)
    host: str = ""


@dataclass(slots=True)
class Listener:
    """Who hears of the engine; called in the event loop."""

    on_message: Callable[[Any], None]
    on_down: Callable[[str], None]  # the engine is gone, and why; requests under way are lost
    on_phase: Callable[[str, float], None] = field(default=lambda name, seconds: None)


class Connection(asyncio.Protocol):
    """One engine process and the socket to it. ``lost`` gets the reason when the engine is gone."""

    def __init__(self, launched: Launched, listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        self.launched = launched
        self.clock_ahead_seconds = 0.0
        self._comparisons: deque[tuple[float, float]] = deque(maxlen=64)  # (round trip, ahead): clocks drift
        self.ready: asyncio.Future[wire.Ready] = loop.create_future()
        self.lost: asyncio.Future[str] = loop.create_future()
        self.last_sign = loop.time()
        self._time = loop.time
        self._listener = listener
        self._reader = wire.FrameReader(wire.from_engine)
        self._transport: asyncio.Transport | None = None
        self._pinged: float | None = None  # when

    def send(self, message: wire.Message) -> None:
        self.send_frame(wire.encode(message))

    def send_frame(self, frame: bytearray) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def ping(self) -> None:
        """One at a time: a busy engine need not answer them all."""
        if self._pinged is None:
            self._pinged = time.monotonic()
            self.send(wire.Ping())

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.last_sign = self._time()
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except wire.WireError as error:
            self.fail(f"the engine's connection is broken: {error}")

    def _take(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Phase(name, seconds):
                self._listener.on_phase(name, seconds)
            case wire.Ready():
                if not self.ready.done():
                    self.ready.set_result(message)
            case wire.Failed(text, user_error):
                if not self.ready.done():
                    self.ready.set_exception(ForetellError(text) if user_error else UnavailableError(text))
                self.fail(f"the engine failed: {text}")
            case _:
                if isinstance(message, wire.Stats):
                    self._compare(message.now)
                if not self.lost.done():
                    self._listener.on_message(message)

    async def compare_clocks(self, times: int = 5) -> None:
        """Before the first request comes; UnavailableError if the engine is lost meanwhile."""
        while len(self._comparisons) < times:
            if self.lost.done():
                raise UnavailableError(self.lost.result())
            self.ping()
            await asyncio.sleep(0.01)

    def _compare(self, theirs: float) -> None:
        """The two hosts' clocks, as of the ping that was answered soonest of late: at worst half its time off."""
        if self._pinged is None:
            return
        sent, self._pinged = self._pinged, None
        if self.launched.host:
            now = time.monotonic()
            self._comparisons.append((now - sent, theirs - (sent + now) / 2))
            round_trip, ahead = min(self._comparisons)
            self.clock_ahead_seconds = ahead if abs(ahead) > round_trip / 2 else 0.0  # they may well be the same

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        host = self.launched.host
        self.fail(f"the engine died or its host {host} is cut off" if host else "the engine died")

    def fail(self, reason: str) -> None:
        """Give it up for this reason; the process is ended."""
        with suppress(ProcessLookupError):
            self.launched.process.kill()
        if not self.lost.done():
            self.lost.set_result(reason)
        if not self.ready.done():
            self.ready.set_exception(UnavailableError(f"{reason} while it started"))
            self.ready.exception()  # taken note of, should nobody wait for it

    async def end(self) -> None:
        """The process is gone and reaped when this returns."""
        self.fail("the engine was ended")
        if self._transport is not None:
            self._transport.abort()
        await asyncio.to_thread(self.launched.process.wait)


async def connect(launched: Launched, listener: Listener) -> Connection:
    process, ours = launched.process, launched.sock
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(lambda: Connection(launched, listener), sock=ours)
    except BaseException:
        process.kill()
        process.wait()
        ours.close()
        raise
    return connection
