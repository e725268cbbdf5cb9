"""Sending at the workload's own pace. In an open loop a request is sent when it is due, however far behind the
server is, and its latencies count from that moment: a slow server cannot slow down the clock it is measured by
("coordinated omission", Tene 2013)."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from foretell.loadgen.http import Answer, HttpClient, HttpError
from foretell.loadgen.interface import Interface
from foretell.loadgen.prompts import PromptMaker
from foretell.loadgen.stream import StreamReader, Usage, error_of_body
from foretell.trace.metrics import RequestTimes, Spread

LEAD_SECONDS = 0.05  # from starting the clock to time 0 of the workload
READY_BYTES = 256 << 20  # request bodies made before the clock starts
MAX_REFUSAL_BYTES = 64 << 10
INTERRUPTED = "interrupted"
Advance = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    """Open loop: requests at their arrival times, at most ``max_concurrency`` at once (the others wait here, and
    that wait counts). Closed loop: ``max_concurrency`` users, each of whom sends its next request when it has
    the last one's answer, for ``duration_seconds`` if given. Seconds; ``timeout`` of one request from its sending."""

    closed: bool = False
    max_concurrency: int | None = None
    duration_seconds: float | None = None
    timeout_seconds: float = 600.0


@dataclass(slots=True)
class Sent:
    """One request, as its caller lived through it. Times in seconds on the workload's clock."""

    index: int
    due: float
    prompt_len: int
    output_len: int
    sent: float = math.nan
    ended: float = math.nan
    status: int = 0
    kind: str | None = None  # of the error
    detail: str = ""
    reader: StreamReader = field(default_factory=StreamReader)

    @property
    def usage(self) -> Usage:
        return self.reader.usage or Usage()

    def times(self) -> RequestTimes:
        details = self.usage.prompt_tokens_details
        prompt_tokens = self.usage.prompt_tokens
        return RequestTimes(
            self.due,
            self.prompt_len if prompt_tokens is None else prompt_tokens,
            self.reader.token_times,
            cached_tokens=(details and details.cached_tokens) or 0,
            error=self.kind,
            counted_tokens=self.usage.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Run:
    """``lateness``: from when a request was due to when the generator turned to it. ``cpu_seconds`` of the
    generator's own thread, out of ``wall_seconds``."""

    sent: list[Sent]
    lateness: Spread
    wall_seconds: float
    cpu_seconds: float
    connections: int
    interrupted: bool

    @property
    def busy_share(self) -> float:
        """Of one core."""
        return self.cpu_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def errors(self) -> Counter[str]:
        return Counter(sent.kind for sent in self.sent if sent.kind is not None)


class Driver:
    """Sends one workload to one server."""

    def __init__(
        self, client: HttpClient, interface: Interface, prompts: PromptMaker, pace: Pace, *, advance: Advance | None
    ) -> None:
        self.client = client
        self.interface = interface
        self.prompts = prompts
        self.pace = pace
        self.advance = advance
        self.start = 0.0
        self.interrupted = False
        self.sent: list[Sent] = []
        self.lateness: list[float] = []
        self._ready: dict[tuple[int, int], bytes] = {}
        self._room = None if pace.closed or pace.max_concurrency is None else asyncio.Semaphore(pace.max_concurrency)

    async def run(self, variant: int = 1) -> Run:
        """Until every answer is there, or Ctrl-C: then what is still open is given up, and says so."""
        self._prepare(variant)
        opened = self.client.opened
        pacer = asyncio.create_task(self._closed_loop(variant) if self.pace.closed else self._open_loop(variant))
        with _quiet_collector(), self._interrupting(pacer):
            cpu, wall = time.thread_time(), time.monotonic()
            self.start = wall + LEAD_SECONDS
            try:
                await pacer
            except asyncio.CancelledError:
                if not self.interrupted:
                    raise
            cpu, wall = time.thread_time() - cpu, time.monotonic() - wall
        self.sent.sort(key=lambda sent: sent.due)
        connections = self.client.opened - opened
        return Run(self.sent, Spread.of(self.lateness), wall, cpu, connections, self.interrupted)

    # -- pace -------------------------------------------------------------------------------------------------

    async def _open_loop(self, variant: int) -> None:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(self.prompts.workload.requests):
                message = self._message(index, variant)  # made while there is time
                due = self.start + request.arrival_seconds
                await asyncio.sleep(max(0.0, due - time.monotonic()))  # at 0 the others still get their turn
                while (early := due - time.monotonic()) > 0:  # timers are coarse
                    await asyncio.sleep(early)
                self.lateness.append(-early)
                group.create_task(self._one(index, request.arrival_seconds, message))

    async def _closed_loop(self, variant: int) -> None:
        numbers = self._numbers()
        total = len(self.prompts.workload.requests)

        async def user() -> None:
            for number in numbers:
                again, index = divmod(number, total)
                message = self._message(index, variant + again)
                await self._one(index, time.monotonic() - self.start, message)

        await asyncio.sleep(max(0.0, self.start - time.monotonic()))
        async with asyncio.TaskGroup() as group:
            for _ in range(self.pace.max_concurrency or 1):
                group.create_task(user())

    def _numbers(self) -> Iterator[int]:
        """Of the requests to send; without end, but in time, when there is a duration."""
        total, seconds = len(self.prompts.workload.requests), self.pace.duration_seconds
        for number in count():
            over = number >= total if seconds is None else time.monotonic() - self.start >= seconds
            if over:
                return
            yield number

    # -- one request ------------------------------------------------------------------------------------------

    def _prepare(self, variant: int) -> None:
        """Make messages ahead of the clock, as many as fit in READY_BYTES."""
        size = 0
        for index in range(len(self.prompts.workload.requests)):
            if size > READY_BYTES:
                return
            self._ready[index, variant] = message = self._made(index, variant)
            size += len(message)

    def _message(self, index: int, variant: int) -> bytes:
        return self._ready.pop((index, variant), None) or self._made(index, variant)

    def _made(self, index: int, variant: int) -> bytes:
        prompt = self.prompts.prompt(index, variant)
        body = self.interface.body(prompt, self.prompts.workload.requests[index].output_len)
        return self.client.target.message("POST", self.interface.path, body)

    async def _one(self, index: int, due: float, message: bytes) -> None:
        request = self.prompts.workload.requests[index]
        sent = Sent(index, due, request.prompt_len, request.output_len)
        self.sent.append(sent)
        try:
            async with self._room or nullcontext():
                sent.sent = time.monotonic() - self.start
                await self._exchange(sent, message)
        except asyncio.CancelledError:
            sent.kind = INTERRUPTED
            raise
        finally:
            sent.ended = time.monotonic() - self.start
            if self.advance is not None:
                self.advance(len(sent.reader.token_times))

    async def _exchange(self, sent: Sent, message: bytes) -> None:
        """Send, follow the answer, and say in ``sent`` how it ended."""
        refusal = bytearray()
        reader, start = sent.reader, self.start

        def on_body(answer: Answer, data: bytes, now: float) -> None:
            if answer.status == 200:
                reader.push(data, now - start)
            elif len(refusal) < MAX_REFUSAL_BYTES:
                refusal.extend(data)

        deadline = asyncio.get_running_loop().time() + self.pace.timeout_seconds
        try:
            answer = await self.client.request(message, on_body, deadline=deadline)
        except TimeoutError:
            sent.kind, sent.detail = "timeout", f"no end within {self.pace.timeout_seconds:g} s"
            return
        except HttpError as error:
            sent.kind, sent.detail = error.kind, str(error)
            return
        sent.status = answer.status
        if answer.status != 200:
            sent.kind, sent.detail = f"HTTP {answer.status}", error_of_body(bytes(refusal))
        elif reader.error is not None:
            sent.kind, sent.detail = "error event", reader.error
        elif not reader.done:
            sent.kind, sent.detail = "cut short", "the stream ended without [DONE]"
        elif not reader.token_times:
            sent.kind, sent.detail = "empty", "the stream held no token"

    @contextmanager
    def _interrupting(self, pacer: asyncio.Task[None]) -> Iterator[None]:
        """Ctrl-C stops the pacer once; a second one stops everything."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop() -> None:
            self.interrupted = True
            loop.remove_signal_handler(signal.SIGINT)
            pacer.cancel()

        loop.add_signal_handler(signal.SIGINT, stop)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No garbage collection in the middle: a pause of ours would count as the server's. There are no cycles to
    collect per request, and what a run allocates it keeps for the report anyway."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on uvloop where it is there."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
