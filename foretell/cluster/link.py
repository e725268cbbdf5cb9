"""The server's side of a cluster: its placer process, and how an engine is launched on some host."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import subprocess
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from foretell.children import python_module, start_child
from foretell.cluster.door import Door
from foretell.cluster.messages import (
    MAX_LINE_BYTES,
    EndInstance,
    ListHosts,
    Reply,
    Started,
    StartInstance,
)
from foretell.cluster.place import Host, Span, describe, place, rooms
from foretell.errors import ConfigError, ForetellError, UnavailableError
from foretell.memory import DEFAULT_KV_SHARE
from foretell.server.connection import Launched

ARRIVAL_SECONDS = 60.0
AVOID_SECONDS = 30.0  # a host that was just lost: Ray takes a while to notice
LAST_LINE = "the placer has ended"


class Cluster:
    """Speaks with the placer, which is started again when it ends, as it does when Ray's head is lost."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.own = ""  # this host's address in the cluster
        self.door: Door | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """ConfigError if there is no such cluster. Does nothing when it is open."""
        async with self._opening:
            if self._writer is not None:
                return
            if self._process is not None:  # it has ended, or says nothing any more
                self._process.kill()
                await asyncio.to_thread(self._process.wait)
            self._process, ours = start_child([*python_module("foretell.cluster.placer"), self.address])
            ours.setblocking(False)
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
            first = self._calls[0] = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read(reader))
            self.own = await first
            if self.door is None:
                self.door = Door(self.own)

    async def close(self) -> None:
        if self.door is not None:
            self.door.close()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._process is not None:
            if self._process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(self._process.wait, 5.0)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decode = msgspec.json.Decoder(Reply).decode
        try:
            while line := await reader.readline():
                reply = decode(line)
                call = self._calls.pop(reply.call, None)
                if call is None or call.done():
                    continue
                if reply.error is None:
                    call.set_result(reply.value)
                else:
                    call.set_exception((ConfigError if reply.user_error else UnavailableError)(reply.error))
        finally:
            if self._writer is not None:
                self._writer.close()
            self._writer = None
            calls, self._calls = self._calls, {}
            for call in calls.values():
                if not call.done():
                    call.set_exception(UnavailableError(f"{LAST_LINE}: is Ray's head node there?"))

    async def _ask(self, message: ListHosts | StartInstance) -> Any:
        await self.open()
        if self._writer is None:
            raise UnavailableError(LAST_LINE)
        call = self._calls[message.call] = asyncio.get_running_loop().create_future()
        self._writer.write(msgspec.json.encode(message) + b"\n")
        return await call

    async def hosts(self) -> list[Host]:
        """Those that Ray takes for alive."""
        return msgspec.convert(await self._ask(ListHosts(next(self._ids))), list[Host])

    async def start(
        self, name: str, spans: Sequence[Span], *, cpus_per_rank: int, gpus: bool, secret: bytes
    ) -> Started:
        await self.open()
        if self.door is None:
            raise UnavailableError(LAST_LINE)
        job = StartInstance(
            next(self._ids), name, list(spans), cpus_per_rank, gpus, self.door.address, self.door.port,
            secret.hex(), secrets.token_hex(32),
        )  # fmt: skip
        return msgspec.convert(await self._ask(job), Started)

    def end(self, name: str) -> None:
        if self._writer is not None:
            self._writer.write(msgspec.json.encode(EndInstance(name)) + b"\n")


class DistantEngine:
    """An engine's process on some host: it ends with its slot, or when it cannot reach us any more."""

    returncode: int | None = None

    def __init__(self, pid: int, on_end: Any) -> None:
        self.pid = pid
        self._on_end = on_end

    def kill(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def wait(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Shape:
    """What every instance is."""

    tp: int
    pp: int
    cpus_per_rank: int
    kv_cache_bytes: int | None


class Launcher:
    """Finds a place for an instance and starts it there. Knows what is where: one for all replicas."""

    def __init__(self, cluster: Cluster, shape: Shape) -> None:
        self.cluster, self.shape = cluster, shape
        self.placed: dict[str, list[Span]] = {}  # by name
        self._lost: dict[str, float] = {}  # hosts, and until when to avoid them
        self._ids = itertools.count(1)
        self._names = secrets.token_hex(4)  # of this server: others may share the cluster

    async def launch(self) -> Launched:
        """ForetellError if there is no place now, or the engine does not come."""
        hosts = await self.cluster.hosts()
        spans = self._choose(hosts)
        name = f"foretell-{self._names}-{next(self._ids)}"
        self.placed[name] = spans
        secret = secrets.token_bytes(32)
        door = self.cluster.door
        if door is None:
            raise UnavailableError(LAST_LINE)
        coming = asyncio.wrap_future(door.expect(name, secret))
        try:
            gpus = any(host.gpus for host in hosts if host.address == spans[0].address)
            started = await self.cluster.start(
                name, spans, cpus_per_rank=self.shape.cpus_per_rank, gpus=gpus, secret=secret
            )
            sock = await asyncio.wait_for(coming, ARRIVAL_SECONDS)
        except BaseException as error:
            door.forget(name)
            coming.cancel()
            self._end(name, lost=isinstance(error, (UnavailableError, TimeoutError)))
            if isinstance(error, TimeoutError):
                raise UnavailableError(
                    f"the engine on host {spans[0].address} has not reached {door.address}:{door.port} within "
                    f"{ARRIVAL_SECONDS:.0f} s: hosts must reach each other on all ports; "
                    "if they do, Ray's logs there say more"
                ) from None
            raise
        engine = DistantEngine(started.pid, lambda: self._end(name, lost=True))
        where = "+".join(span.address for span in spans)
        return Launched(engine, sock, self._options(hosts, spans, started, gpus=gpus), where)

    def _choose(self, hosts: list[Host]) -> list[Span]:
        shape, now = self.shape, asyncio.get_running_loop().time()
        room = rooms(hosts, shape.cpus_per_rank)
        held: Counter[str] = Counter()
        for spans in self.placed.values():
            for span in spans:
                held[span.address] += 1
                if span.address in room:
                    room[span.address] -= len(span.ranks)
        avoid = {address for address, until in self._lost.items() if until > now}
        spans = place(room, held, shape.tp, shape.pp, avoid)
        if not spans:
            free = ", ".join(f"{address}: {count}" for address, count in sorted(room.items()))
            raise UnavailableError(
                f"no place for tp={shape.tp} pp={shape.pp}: free for ranks of {shape.cpus_per_rank} CPUs on "
                f"{describe(hosts)}: {free or 'none'}"
            )
        return spans

    def _end(self, name: str, *, lost: bool) -> None:
        until = asyncio.get_running_loop().time() + AVOID_SECONDS
        for span in self.placed.pop(name, ()):
            if lost:
                self._lost[span.address] = until
        self.cluster.end(name)

    def _options(self, hosts: list[Host], spans: list[Span], started: Started, *, gpus: bool) -> dict[str, Any]:
        """Threads as reserved; of each host's free memory the usual share, less what other instances may come for.
        Ranks on GPUs find out themselves what fits."""
        shape, whole = self.shape, rooms(hosts, self.shape.cpus_per_rank)
        ranks = sum(len(span.ranks) for span in spans)
        per_rank = min(
            DEFAULT_KV_SHARE * started.free_bytes[span.address] / max(1, whole.get(span.address, 1)) for span in spans
        )
        return {
            "num_threads": shape.cpus_per_rank * ranks,
            "kv_cache_bytes": shape.kv_cache_bytes or (None if gpus else max(1, int(per_rank * ranks))),
        }


async def list_hosts(address: str) -> list[Host]:
    """The hosts of a cluster, for commands that ask once. ForetellError if there is none."""
    cluster = Cluster(address)
    try:
        return await cluster.hosts()
    except OSError as error:
        raise ForetellError(f"the placer cannot be started: {error}") from None
    finally:
        await cluster.close()
