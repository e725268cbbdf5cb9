"""A workload through one engine, or through equal replicas behind the server's router, in virtual time. Only what
decides is kept of each request: when its first and its last token came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from foretell.config import SchedulerConfig
from foretell.core.blocks import extend_hashes
from foretell.core.engine import Engine
from foretell.core.fast_forward import FastEngine
from foretell.core.params import SamplingParams
from foretell.core.request import Request
from foretell.executor.lockstep import LockstepExecutor
from foretell.executor.virtual import VirtualExecutor
from foretell.routing import Beginnings, pieces_of, preference
from foretell.trace.metrics import RequestTimes
from foretell.trace.workloads import Workload

MakeEngine = Callable[[SchedulerConfig, VirtualExecutor, Sequence[int | None]], Engine]


class Prompts:
    """The prompts of a workload, with the hashes of their blocks: made once for all configurations."""

    def __init__(self, workload: Workload, vocab_size: int) -> None:
        self.workload = workload
        self.tokens = [workload.token_ids(i, vocab_size) for i in range(len(workload.requests))]
        self.params = _params(workload)
        self._hashes: dict[int, list[list[bytes]]] = {}
        self._pieces: list[list[bytes]] = []

    def hashes(self, block_size: int) -> list[list[bytes]]:
        """Of every request's full blocks."""
        found = self._hashes.get(block_size)
        if found is None:
            found = self._hashes[block_size] = [[] for _ in self.tokens]
            for hashes, tokens in zip(found, self.tokens, strict=True):
                extend_hashes(hashes, tokens, block_size, len(tokens))
        return found

    def pieces(self) -> list[list[bytes]]:
        """What the router knows each prompt by."""
        if not self._pieces:
            self._pieces = [pieces_of(tokens) for tokens in self.tokens]
        return self._pieces

    def share_beginnings(self, block_size: int) -> bool:
        """Whether any two requests begin with the same block."""
        firsts = [hashes[0] for hashes in self.hashes(block_size) if hashes]
        return len(set(firsts)) < len(firsts)


def _params(workload: Workload) -> list[SamplingParams]:
    made: dict[int, SamplingParams] = {}
    for request in workload.requests:
        if request.output_len not in made:
            made[request.output_len] = SamplingParams(temperature=0, max_tokens=request.output_len, ignore_eos=True)
    return [made[request.output_len] for request in workload.requests]


@dataclass(slots=True)
class _Fate:
    """One request's tokens."""

    first: float | None = None
    last: float = 0.0


@dataclass(slots=True)
class Replica:
    """One engine on its own virtual clock."""

    engine: Engine
    executor: VirtualExecutor
    fates: dict[int, _Fate] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)
    beginnings: Beginnings = field(default_factory=Beginnings)
    unfinished: int = 0

    def run(self, until: float | None, first_token: Callable[[int], None] | None = None) -> None:
        """To this time, or to the end of all it has."""
        engine, executor, fates = self.engine, self.executor, self.fates
        while engine.has_work and (until is None or executor.now < until):
            if self._run_ahead(until):
                continue
            for output in engine.step(until):
                if output.token_id is not None:
                    fate = fates[output.request_id]
                    fate.last = executor.now
                    if fate.first is None:
                        fate.first = fate.last
                        if first_token is not None:
                            first_token(output.request_id)
                if output.finish_reason is not None:
                    self.unfinished -= 1

    def _run_ahead(self, until: float | None) -> bool:
        """Take many steps at once, if they are of that kind."""
        if isinstance(self.engine, FastEngine):
            ended = self.engine.fast_forward(until)
            for request_id, at in ended or ():
                self.fates[request_id].last = at
                self.unfinished -= 1
            return ended is not None
        stretch = self.engine.run_ahead(until)
        if stretch is None:
            return False
        for request_id in stretch.request_ids:
            self.fates[request_id].last = stretch.finished[-1]
        return True

    def add(self, index: int, tokens: list[int], params: SamplingParams, arrival: float, hashes: list[bytes]) -> None:
        if not self.engine.has_work:
            self.executor.wait(arrival)
        request = self.requests[index] = self.engine.add(index, tokens, params, arrival=arrival)
        request.hashes = list(hashes)
        self.fates[index] = _Fate()
        self.unfinished += 1


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a run went towards each limit: one that no replica reached would not have mattered if it were wider."""

    peak_running: int
    most_tokens: int  # in one step
    longest_chunk: int
    refused: bool  # a request found no room
    preempted: bool
    evicted: bool  # a cached block was taken for another


@dataclass(frozen=True, slots=True)
class FleetRun:
    """Requests in the order of the workload; ``seconds`` to the last token."""

    requests: list[RequestTimes]
    seconds: float
    steps: int
    extent: Extent


def serve(
    prompts: Prompts,
    config: SchedulerConfig,
    windows: Sequence[int | None],
    executors: Iterable[VirtualExecutor],
    make_engine: MakeEngine | None = None,
) -> FleetRun:
    """The workload through one engine for each of the executors, by default the fastest kind that can be."""
    make = make_engine or fastest_engine
    replicas = [Replica(make(config, executor, windows), executor) for executor in executors]
    hashes = prompts.hashes(config.block_size) if config.enable_prefix_caching else [[]] * len(prompts.tokens)
    routed = len(replicas) > 1
    pieces = prompts.pieces() if routed else []
    owner: list[Replica] = []

    def first_token(index: int) -> None:
        owner[index].beginnings.note(pieces[index])

    for index, asked in enumerate(prompts.workload.requests):
        arrival, chosen = asked.arrival_seconds, replicas[0]
        for replica in replicas:
            replica.run(arrival, first_token if routed else None)
        if routed:
            chosen = replicas[_best(replicas, pieces[index], index)]
        owner.append(chosen)
        chosen.add(index, prompts.tokens[index], prompts.params[index], arrival, hashes[index])
    for replica in replicas:
        replica.run(None)
    return FleetRun(
        [_times(owner[i], i) for i in range(len(owner))],
        max(replica.executor.now for replica in replicas),
        sum(replica.engine.scheduler.num_batches for replica in replicas),
        _extent(replicas),
    )


def fastest_engine(config: SchedulerConfig, executor: VirtualExecutor, windows: Sequence[int | None]) -> Engine:
    if isinstance(executor, LockstepExecutor):
        return FastEngine(config, executor, windows)
    return Engine(config, executor, windows)


def _best(replicas: Sequence[Replica], pieces: Sequence[bytes], turn: int) -> int:
    unfinished = [replica.unfinished for replica in replicas]
    return preference(unfinished, lambda i: replicas[i].beginnings.matching(pieces), turn)[0]


def _times(replica: Replica, index: int) -> RequestTimes:
    request, fate = replica.requests[index], replica.fates[index]
    return RequestTimes(
        request.arrival,
        request.prompt_len,
        (fate.first or 0.0, fate.last),
        first_scheduled=request.first_scheduled,
        cached_tokens=request.cached_tokens,
        preemptions=request.preemptions,
        counted_tokens=request.num_outputs,
    )


def _extent(replicas: Sequence[Replica]) -> Extent:
    schedulers = [replica.engine.scheduler for replica in replicas]
    return Extent(
        max(s.counters.peak_running for s in schedulers),
        max(replica.executor.most_tokens for replica in replicas),
        max(replica.executor.longest_chunk for replica in replicas),
        any(s.admission.refusals for s in schedulers),
        any(s.counters.preemptions for s in schedulers),
        any(pool.evictions for s in schedulers for pool in s.blocks.pools),
    )
