"""The engine process as seen from the server: started, watched, restarted, and never left behind.

An engine that dies, that sends what is no message, or that shows no sign of life for ``hang_seconds`` is ended, and
another one is started; starts that fail are tried again after a pause that doubles each time.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from foretell.children import python_module, start_child
from foretell.errors import ForetellError, UnavailableError
from foretell.server import wire
from foretell.server.connection import Connection, Launched, Listener, connect

log = logging.getLogger("foretell.server")
ENGINE_COMMAND = tuple(python_module("foretell.server.engine_process"))
State = Literal["starting", "running", "restarting", "stopped"]


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
        self._connection: Connection | None = None
        self._host = ""
        self._unreaped: set[Connection] = set()
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

    async def _start_one(self) -> tuple[Connection, wire.Ready]:
        connection = await connect(await self._launch(), self._listener)
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

    async def _end(self, connection: Connection) -> None:
        await connection.end()
        self._unreaped.discard(connection)

    async def _keep_running(self, connection: Connection) -> None:
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

    async def _restart(self) -> Connection:
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


def how_it_ended(status: int | None) -> str:
    """An exit status in words."""
    if status == -signal.SIGKILL:
        return "killed: by this server, for want of memory, or by hand"
    if status is not None and status < 0:
        with suppress(ValueError):
            return f"by signal {signal.Signals(-status).name}"
    return f"exit status {status}"
