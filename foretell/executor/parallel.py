"""The parallel executor: the same brain, its batches computed by tp × pp processes that share the model.

One driver (this process) sends every batch to every rank as plain data. Several are in flight (``depth``, see
``layout.in_flight``): with two stages, the second works on the first batch while the first works on the second. A
rank that dies or hangs is named, all others are ended, and ``wait`` raises ``RankError``: the engine stops, and a
server starts a new one.
"""

from __future__ import annotations

import math
import select
import selectors
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING

from foretell.core.messages import Batch, Result
from foretell.core.params import SamplingParams
from foretell.errors import ForetellError
from foretell.executor.prepare import Preparing
from foretell.parallel.layout import Layout, in_flight
from foretell.parallel.meeting import Meeting, RankProcess, start_here
from foretell.parallel.messages import (
    Beat,
    Channel,
    Done,
    Failed,
    Prepare,
    Prepared,
    Ready,
    Setup,
    Step,
    Stop,
    ToDriver,
)

if TYPE_CHECKING:
    from foretell.grammar.compiler import GrammarCompiler

SILENT_SECONDS = 5.0  # a rank beats twice a second; silent so long, it is stopped or its machine is gone
LOADING_SILENT_SECONDS = 60.0  # importing torch on a busy machine leaves no room for a heartbeat
SLOWEST_STEP_SECONDS = 120.0  # no step may take longer, nor 10 × the longest of its size so far if that is more
LOAD_SECONDS = 1800.0
GRACE_SECONDS = 0.5  # after the first sign of trouble: the cause is who was killed, not who complained first


class RankError(ForetellError):
    """A rank died or hangs; the message names it, its phase and the reason."""


@dataclass(slots=True)
class Rank:
    """What the driver knows of one rank."""

    name: str
    process: RankProcess
    channel: Channel
    phase: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    ready: Ready | None = None
    lost: str = ""  # why, once it is
    host: str = ""  # another one than the driver's


class ParallelExecutor:
    """Starts the ranks, which load at once. ``num_blocks`` is what they say."""

    def __init__(
        self,
        layout: Layout,
        setup: Callable[[int, str], Setup],
        *,
        device: str = "cpu",
        progress: Callable[[str], None] | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        """``setup(rank, store_url)``: what that rank is told first. ``meeting``: where ranks of other hosts come."""
        self.layout = layout
        self.depth, self.chain = in_flight(layout.pp, device)
        self._preparing = Preparing()
        self._sampling_rank = next(
            i for i in range(layout.num_ranks) if layout.place(i).is_last and layout.place(i).shard == 0
        )
        self._results: deque[Result] = deque()
        self._sent: dict[int, tuple[float, int]] = {}  # batches in flight: when they were sent, their tokens
        # by request that the ranks know: tokens sampled and not yet sent to those that did not sample them
        self._tokens: dict[int, list[int]] = {}
        self._slowest = 0.0
        self._wake_in, self._wake_out = socket.socketpair()  # a closed one knows that it is: another thread may wake
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._folder = Path(tempfile.mkdtemp(prefix="foretell-ranks-"))
        self._meeting = meeting
        store_url = f"file://{self._folder}/store" if meeting is None else meeting.open_store()
        self.ranks: list[Rank] = []
        self._closed = False
        try:
            for rank in range(layout.num_ranks):
                self._start(rank, setup(rank, store_url))
            self._load(progress)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, setup: Setup) -> None:
        name, host = str(self.layout.place(number)), ""
        if self._meeting is None:
            process, ours = start_here()
        else:
            process, ours = self._meeting.wait_for(number, name)
            host = self._meeting.hosts[number]
        rank = Rank(name, process, Channel(ours, ToDriver), host=host)
        self.ranks.append(rank)
        self._selector.register(ours, selectors.EVENT_READ, rank)
        rank.channel.send(setup)

    def _load(self, progress: Callable[[str], None] | None) -> None:
        until = time.monotonic() + LOAD_SECONDS
        while waiting := [rank for rank in self.ranks if rank.ready is None]:
            if time.monotonic() > until:
                self._fail(f"{waiting[0].name} has not loaded within {LOAD_SECONDS:.0f} s: {waiting[0].phase}")
            if progress is not None:
                progress(f"{waiting[0].name}: {waiting[0].phase}")
            self._poll(1.0)
        self.num_blocks = tuple(ready_of(self.ranks)[0].num_blocks)
        shutil.rmtree(self._folder, ignore_errors=True)  # they have met: should this process be killed, nothing stays

    # -- the executor's interface -------------------------------------------------------------------

    @property
    def now(self) -> float:
        return time.monotonic()

    def use_grammars(self, grammars: GrammarCompiler) -> None:
        """The rank that samples has its own."""
        grammars.close()

    def prepare(self, params: SamplingParams) -> Future[None] | None:
        if params.structured is None:
            return None
        number, prepared = self._preparing.begin()
        try:
            self.ranks[self._sampling_rank].channel.send(Prepare(number, params.structured))
        except OSError:  # it is gone: the next look at it ends the engine
            self._preparing.give_up()
        return prepared

    def submit(self, batch: Batch) -> None:
        for request_id in batch.removed:
            self._tokens.pop(request_id, None)
        for added in batch.added:  # it brings its tokens along
            self._tokens[added.request_id] = []
        tokens = {c.request_id: new for c in batch.chunks if (new := self._tokens[c.request_id])}
        self._tokens.update((request_id, []) for request_id in tokens)
        self._sent[batch.id] = (self.now, batch.num_tokens)
        step = self.ranks[0].channel.frame(Step(batch, tokens))
        for rank in self.ranks:
            with suppress(OSError):  # it is gone: the next look at it says so
                rank.channel.send_frame(step)

    def wait(self, until: float | None) -> Result | None:
        """RankError once a rank is lost, also while nothing is in flight."""
        while not self._results:
            limit = math.inf if until is None else until
            if limit <= self.now:
                return None
            woken = self._poll(min(1.0, limit - self.now))
            if not self._results and woken and not (until is None and self._sent):
                return None
        return self._results.popleft()

    def wake(self) -> None:
        with suppress(OSError):  # full: it is awake; closed: there is nobody
            self._wake_out.send(b"w")

    def close(self) -> None:
        """End all ranks. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._preparing.give_up()
        for rank in self.ranks:
            with suppress(OSError):
                rank.channel.send(Stop())
        deadline = time.monotonic() + 2.0
        for rank in self.ranks:
            with suppress(TimeoutExpired):
                rank.process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._selector.close()
        for rank in self.ranks:
            rank.channel.close()
        if self._meeting is not None:
            self._meeting.close()
        self._wake_in.close()
        self._wake_out.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- listening ----------------------------------------------------------------------------------

    def _poll(self, timeout: float) -> bool:
        """Take in what the ranks say; True when woken. RankError when one is lost."""
        woken = False
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                with suppress(BlockingIOError):
                    self._wake_in.recv(1 << 16)
                woken = True
            else:
                self._listen(key.data)
        self._look_after()
        return woken

    def _listen(self, rank: Rank) -> None:
        try:
            rank.channel.fill()
            while (message := rank.channel.pop()) is not None:
                rank.heard = time.monotonic()
                self._hear(rank, message)
        except (EOFError, OSError):
            self._selector.unregister(rank.channel.sock)
            rank.lost = rank.lost or ("died or is cut off" if rank.host else "died")

    def _hear(self, rank: Rank, message: object) -> None:
        match message:
            case Beat(phase):
                rank.phase = phase
            case Ready():
                rank.ready = message
            case Failed(reason):
                rank.lost = f"failed: {reason}"
            case Prepared(number, error, later):
                self._preparing.end(number, error, later=later)
            case Done(batch_id, results, started, finished, parts):
                sent, _ = self._sent.pop(batch_id)
                if self._meeting is not None:  # another host's clock: only the time between is worth something
                    started, finished = self.now - (finished - started), self.now
                self._slowest = max(self._slowest, finished - sent)
                for result in results:
                    if result.token_id is not None and result.request_id in self._tokens:
                        self._tokens[result.request_id].append(result.token_id)
                self._results.append(Result(batch_id, results, started, finished, parts))

    def _look_after(self) -> None:
        now = time.monotonic()
        for rank in self.ranks:
            limit = LOADING_SILENT_SECONDS if rank.ready is None else SILENT_SECONDS
            if not rank.lost and now - rank.heard > limit:
                rank.lost = f"has been silent for {now - rank.heard:.0f} s"
        if any(rank.lost for rank in self.ranks):
            self._fail(self._cause())
        oldest = min((sent for sent, _ in self._sent.values()), default=now)
        longest = max(SLOWEST_STEP_SECONDS, 10 * self._slowest)
        if now - oldest > longest:
            phases = "; ".join(f"{rank.name}: {rank.phase}" for rank in self.ranks)
            self._fail(f"a step has taken {now - oldest:.0f} s, the limit being {longest:.0f}: {phases}")

    def _cause(self) -> str:
        """The rank that is the reason: one that was killed before those that missed it."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not any(was_killed(rank) for rank in self.ranks):
            select.select([], [], [], 0.05)
        killed = [rank for rank in self.ranks if was_killed(rank)]
        silent = [rank for rank in self.ranks if "silent" in rank.lost]
        lost = [rank for rank in self.ranks if rank.lost]
        rank = (killed or silent or lost)[0]
        code = rank.process.poll()
        what = f"was ended by signal {-code}" if code is not None and code < 0 else rank.lost
        host = rank.host or socket.gethostname()
        return f"{rank.name} of host {host} {what}; it was at: {rank.phase}"

    def _fail(self, reason: str) -> None:
        self._kill()
        self._preparing.give_up()
        raise RankError(f"the parallel engine stopped: {reason}")

    def _kill(self) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
        for rank in self.ranks:
            rank.process.wait()


def was_killed(rank: Rank) -> bool:
    code = rank.process.poll()
    return code is not None and code < 0


def ready_of(ranks: Sequence[Rank]) -> list[Ready]:
    return [rank.ready for rank in ranks if rank.ready is not None]
