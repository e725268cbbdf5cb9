"""The engine process as seen from the server: started, watched, restarted, and never left behind.

An engine that dies, that sends what is no message, or that shows no sign of life for ``hang_seconds`` is ended, and
another one is started; starts that fail are tried again after a pause that doubles each time.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from foretell.children import python_module, start_child
from foretell.errors import ForetellError, UnavailableError
from foretell.server import wire

log = logging.getLogger("foretell.server")
ENGINE_COMMAND = tuple(python_module("foretell.server.engine_process"))
State = Literal["starting", "running", "restarting", "stopped"]


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


Launch = Callable[[], Awaitable[Launched]]


def launch_here(command: Sequence[str]) -> Launch:
    """A child of this process and thread: Linux ends it with them."""

    async def launch() -> Launched:
        process, ours = start_child(command)
        return Launched(process, ours)

    return launch


@dataclass(frozen=True, slots=True)
class Watch:
    """Patience, in seconds. A step can be long, so ``stall_seconds`` without a sign of life only turns the health
    red; ``hang_seconds`` end the process."""

    ping_seconds: float = 1.0
    stall_seconds: float = 30.0
    hang_seconds: float = 300.0
    first_pause_seconds: float = 0.1  # before an engine is replaced; a start takes seconds anyway
    longest_pause_seconds: float = 30.0  # doubled for every start that fails, up to this


@dataclass(slots=True)
class Listener:
    """Who hears of the engine; called in the event loop."""

    on_message: Callable[[Any], None]
    on_down: Callable[[str], None]  # the engine is gone, and why; requests under way are lost
    on_phase: Callable[[str, float], None] = field(default=lambda name, seconds: None)


class Supervisor:
    """Belongs to the event loop it is started in, and to that loop's thread for as long as it runs."""

    def __init__(
        self,
        options: dict[str, Any],
        listener: Listener,
        *,
        watch: Watch | None = None,
        launch: Launch | None = None,
    ) -> None:
        self.options = options  # of the next start
        self.state: State = "stopped"
        self.restarts = 0
        self.watch = watch or Watch()
        self._listener = listener
        self._launch = launch or launch_here(ENGINE_COMMAND)
        self._connection: _Connection | None = None
        self._host = ""
        self._unreaped: set[_Connection] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> wire.Ready:
        """The first engine, ready. ForetellError, in the engine's own words, if it cannot start."""
        self.state = "starting"
        try:
            connection, ready = await self._start_one()
        except BaseException:
            self.state = "stopped"
            raise
        self._tasks = [asyncio.create_task(self._keep_running(connection)), asyncio.create_task(self._beat())]
        return ready

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End the engine: after the step in progress, or by force when that takes longer than the grace."""
        self.state = "stopped"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.send(wire.Shutdown())
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(connection.lost), grace_seconds)
        for connection in list(self._unreaped):
            await self._end(connection)

    def send(self, message: wire.Message) -> None:
        """UnavailableError without an engine; WireError for what fits no frame."""
        self.send_frame(wire.encode(message))

    def send_frame(self, frame: bytearray) -> None:
        """As ``send``, of a message that has been encoded already."""
        if self._connection is None or self.state != "running":
            raise UnavailableError(f"the engine is {self.state}: try again in a few seconds")
        self._connection.send_frame(frame)

    @property
    def silent_seconds(self) -> float:
        """Since the engine's last sign of life; infinite without an engine."""
        if self._connection is None or self.state != "running":
            return float("inf")
        return asyncio.get_running_loop().time() - self._connection.last_sign

    @property
    def pid(self) -> int | None:
        return self._connection.launched.process.pid if self._connection is not None else None

    @property
    def host(self) -> str:
        """Where the engine is, or was last; "" for this host."""
        return self._host

    @property
    def clock_ahead_seconds(self) -> float:
        """By how much the monotonic clock of the engine's host is ahead of ours; 0 on the same host."""
        return self._connection.clock_ahead_seconds if self._connection is not None else 0.0

    # -- one engine after the other -----------------------------------------------------------------

    async def _start_one(self) -> tuple[_Connection, wire.Ready]:
        connection = await _connect(await self._launch(), self._listener)
        self._unreaped.add(connection)
        try:
            connection.send(wire.Start({**self.options, **connection.launched.options}))
            ready = await connection.ready
            if connection.launched.host:
                await connection.compare_clocks()
        except BaseException:
            await self._end(connection)
            raise
        self._connection, self.state, self._host = connection, "running", connection.launched.host
        return connection, ready

    async def _end(self, connection: _Connection) -> None:
        await connection.end()
        self._unreaped.discard(connection)

    async def _keep_running(self, connection: _Connection) -> None:
        while True:
            reason = await asyncio.shield(connection.lost)
            self._connection, self.state = None, "restarting"
            self._listener.on_down(reason)
            await self._end(connection)
            host, status = connection.launched.host, connection.launched.process.returncode
            how = f"on host {host}" if host else how_it_ended(status)
            log.error("%s (%s); starting another", reason, how)
            connection = await self._restart()
            self.restarts += 1

    async def _restart(self) -> _Connection:
        """Try until an engine runs."""
        pause = self.watch.first_pause_seconds
        while True:
            await asyncio.sleep(pause)
            try:
                connection, _ = await self._start_one()
            except (ForetellError, OSError) as error:
                pause = min(2 * pause, self.watch.longest_pause_seconds)
                log.error("the engine cannot be started: %s; next try in %.1f s", error, pause)
            else:
                log.warning("the engine runs again")
                return connection

    async def _beat(self) -> None:
        """Ask for a sign of life; end an engine that gives none."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self.watch.ping_seconds
            await asyncio.sleep(self.watch.ping_seconds)
            connection = self._connection
            if connection is None or self.state != "running":
                continue
            connection.ping()
            late = loop.time() - due  # this loop was busy itself: what the engine sent may lie unread
            if self.silent_seconds - late > self.watch.hang_seconds:
                connection.fail(f"the engine has hung for {self.watch.hang_seconds:g} s")


class _Connection(asyncio.Protocol):
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


def how_it_ended(status: int | None) -> str:
    """An exit status in words."""
    if status == -signal.SIGKILL:
        return "killed: by this server, for want of memory, or by hand"
    if status is not None and status < 0:
        with suppress(ValueError):
            return f"by signal {signal.Signals(-status).name}"
    return f"exit status {status}"


async def _connect(launched: Launched, listener: Listener) -> _Connection:
    process, ours = launched.process, launched.sock
    ours.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        _, connection = await loop.create_connection(lambda: _Connection(launched, listener), sock=ours)
    except BaseException:
        process.kill()
        process.wait()
        ours.close()
        raise
    return connection
