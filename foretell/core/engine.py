"""The engine loop: schedule, execute, update. The same object for every executor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from foretell.config import SchedulerConfig
from foretell.core import ahead
from foretell.core.ahead import Stretch
from foretell.core.blocks import BlockManager
from foretell.core.messages import Batch, Output, Result, Turn
from foretell.core.params import SamplingParams
from foretell.core.policy import get_policy
from foretell.core.request import Request
from foretell.core.scheduler import Scheduler
from foretell.executor.base import Executor, RunsAhead

Event = dict[str, Any]


class Watcher(Protocol):
    """Hears of every finished step: for who compares its time with a prediction."""

    def __call__(self, batch: Batch, result: Result) -> None: ...

    def figures(self) -> dict[str, Any]: ...


class Engine:
    """Brain and executor together. Not thread-safe: one thread owns it; others only call ``executor.wake``.

    ``on_event`` gets every input the brain acts on (arrivals, aborts, switches, finishes, results, wakes), in
    order, with ``now``: enough to replay the run exactly. ``on_step`` gets one record per finished batch;
    it may be changed between two steps.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        executor: Executor,
        windows: Iterable[int | None] = (None,),
        *,
        scheduler: type[Scheduler] = Scheduler,
        on_event: Callable[[Event], None] | None = None,
        on_step: Callable[[Event], None] | None = None,
    ) -> None:
        self.executor = executor
        # no sequence outgrows max_model_len: a wider window asks for no more blocks than that
        reach = tuple(w if w is None else min(w, config.max_model_len) for w in windows)
        blocks = BlockManager(executor.num_blocks, reach, config.block_size, caching=config.enable_prefix_caching)
        self.scheduler = scheduler(config, blocks, depth=executor.depth, chain=executor.chain)
        self._ahead = executor if isinstance(executor, RunsAhead) else None
        self._in_flight: dict[int, Turn] = {}
        self._on_event = on_event
        self.on_step = on_step
        self.watcher: Watcher | None = None

    # -- inputs -------------------------------------------------------------------------------------

    def add(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival: float | None = None,
    ) -> Request:
        """Accept a request. Raises InvalidRequestError, with nothing changed, if it could never run."""
        now = self.executor.now
        request = Request(
            request_id,
            prompt_token_ids,
            params,
            priority=priority,
            arrival=now if arrival is None else arrival,
        )
        self.scheduler.add(request)
        if self._on_event:
            self._log("add", id=request_id, tokens=list(prompt_token_ids), params=params, priority=priority)
        return request

    def finish(self, request_id: int, reason: str = "abort") -> bool:
        """End a request at once: a client that left, or a stop string found in its text."""
        self._log("finish", id=request_id, reason=reason)
        return self.scheduler.finish(request_id, reason)

    def preempt(self, request_id: int, reason: str = "forced") -> bool:
        self._log("preempt", id=request_id, reason=reason)
        return self.scheduler.preempt(request_id, reason)

    def set_policy(self, name: str) -> None:
        """Switch the policy between two steps; running requests go on."""
        self.scheduler.policy = get_policy(name)
        self._log("policy", name=name)

    def stats(self) -> dict[str, Any]:
        """How it stands: counts of requests, shares and numbers of KV blocks, tokens since the start."""
        scheduler = self.scheduler
        counters = scheduler.counters
        return {
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
            "requests": len(scheduler.requests),  # with those that ended while a batch of theirs was in flight
            "policy": scheduler.policy.name,
            "kv_usage": scheduler.blocks.usage,
            "kv_blocks": sum(pool.num_blocks for pool in scheduler.blocks.pools),
            "kv_blocks_held": sum(pool.num_blocks - pool.num_free for pool in scheduler.blocks.pools),
            "steps": scheduler.num_batches,
            "prompt_tokens": counters.prompt_tokens,
            "generation_tokens": counters.generation_tokens,
            "prefix_cache_queries": counters.prefix_cache_queries,
            "prefix_cache_hits": counters.prefix_cache_hits,
            "preemptions": dict(counters.preemptions),
            "prediction": None if self.watcher is None else self.watcher.figures(),
        }

    # -- the loop -----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._in_flight)

    def step(self, until: float | None = None) -> list[Output]:
        """Fill the executor to its depth, wait for one batch (or ``until``, or a wake), take in its results."""
        while len(self._in_flight) < self.executor.depth:
            turn = self.scheduler.schedule(self.executor.now)
            if turn is None:
                break
            self._in_flight[turn.batch.id] = turn
            self.executor.submit(turn.batch)
        if not self._in_flight and self.scheduler.has_unfinished:
            raise RuntimeError("the scheduler is stuck: requests wait, nothing runs, nothing can be scheduled")
        if not self._in_flight and until is None:
            return []
        result = self.executor.wait(until)
        if result is None:
            self._log("wake")
            return []
        return self._take(result)

    def run_ahead(self, until: float | None = None) -> Stretch | None:
        """Take at once all decode steps that end by ``until`` and between which nothing else can happen; None if the
        next step is not such a one. Only where the executor can (virtual time) and nobody wants single steps."""
        scheduler = self.scheduler
        if self._ahead is None or self._on_event or self.on_step or len(self._in_flight) != scheduler.depth - 1:
            return None
        requests = ahead.decoding(scheduler)
        if self._in_flight and not ahead.holds_all(next(iter(self._in_flight.values())).batch, requests):
            return None
        most = ahead.most_steps(scheduler, requests) if requests else 0
        if most < 1:
            return None
        tokens, finished = self._ahead.decode_ahead(requests, most, until)
        if not finished:
            return None
        stretch = ahead.advance(scheduler, requests, tokens, finished)
        if self._in_flight:  # the last batch that was submitted has taken the place of the first
            batch = ahead.last_batch(scheduler, requests)
            self._in_flight = {batch.id: Turn(scheduler.turn, batch)}
            scheduler.replace_in_flight(batch)
        return stretch

    def _take(self, result: Result) -> list[Output]:
        turn = self._in_flight.pop(result.batch_id)
        if self.watcher is not None:
            self.watcher(turn.batch, result)
        if self._on_event:
            tokens = {r.request_id: r.token_id for r in result.results if r.token_id is not None}
            errors = {r.request_id: r.error for r in result.results if r.error is not None}
            ended = [r.request_id for r in result.results if r.ended or r.embedding is not None]
            self._log("result", batch=result.batch_id, tokens=tokens, errors=errors, ended=ended)
        record = self._record(turn, result) if self.on_step else None
        outputs = self.scheduler.update(result)
        if record is not None and self.on_step:
            self.on_step(record)
        return outputs

    def _log(self, kind: str, **fields: Any) -> None:
        if self._on_event:
            self._on_event({"event": kind, "now": self.executor.now, **fields})

    def _record(self, turn: Turn, result: Result) -> Event:
        """One step, for calibration, metrics, the dashboard and the trace. Lengths are tokens, times seconds."""
        scheduler = self.scheduler
        chunks = []
        for chunk in turn.batch.chunks:
            request = scheduler.requests[chunk.request_id]
            prefill = chunk.start < request.prefill_end
            chunks.append(
                {
                    "request": chunk.request_id,
                    "phase": "prefill" if prefill else "decode",
                    "tokens": chunk.length,
                    "kv_len": chunk.start + chunk.length,
                }
            )
        return {
            "batch": turn.batch.id,
            "turn": turn.turn,
            "policy": scheduler.policy.name,
            "started": result.started,
            "finished": result.finished,
            "seconds": result.finished - result.started,
            "parts": result.parts,
            "tokens": turn.batch.num_tokens,
            "chunks": chunks,
            "added": [a.request_id for a in turn.batch.added],
            "preempted": [{"request": i, "reason": reason} for i, reason in turn.preempted],
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
            "kv_usage": scheduler.blocks.usage,
        }
