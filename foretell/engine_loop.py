"""The loop around the engine: commands in between two steps, every step's outputs to a sink.

One thread runs it and owns the engine: a thread of its own beside a caller (``EngineService``), or the main thread of
an engine process. It knows token ids only; text is the business of ``tracking``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from foretell.core.engine import Engine
from foretell.core.messages import Output
from foretell.core.params import SamplingParams
from foretell.errors import ForetellError

Sink = Callable[[list[Output], float], None]  # a step's outputs, and the time on the executor's clock


class EngineLoop:
    """``post`` and ``close`` may be called from any thread. ``sink`` and ``on_stop`` are called in the loop's own;
    ``on_stop`` once, at the end, with the error that ended it, if one did: nothing comes after it."""

    def __init__(self, engine: Engine, sink: Sink, on_stop: Callable[[BaseException | None], None]) -> None:
        self.engine = engine
        self._sink = sink
        self._on_stop = on_stop
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing may enter the inbox once the loop has emptied it for good
        self._stopped = False
        self._closing = False
        self._dead: BaseException | None = None

    def post(self, function: Callable[[], None]) -> None:
        """Have ``function`` run between two steps. Raises ForetellError once the loop has stopped."""
        with self._lock:
            if not self.is_running:
                raise ForetellError(f"the engine has stopped{f': {self._dead}' if self._dead else ''}")
            self._inbox.put(function)
        self.engine.executor.wake()

    def call(self, function: Callable[[Engine], Any]) -> Future[Any]:
        """As ``post``; the future is for who wants to wait for what ``function`` returns, or hear of its errors."""
        done: Future[Any] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return  # who asked has left
            try:
                done.set_result(function(self.engine))
            except Exception as error:
                done.set_exception(error)

        self.post(run)
        return done

    @property
    def is_running(self) -> bool:
        return not (self._stopped or self._closing)

    def close(self) -> bool:
        """Make ``run`` return after the step in progress; False if somebody has asked already."""
        if self._closing:
            return False
        self._closing = True
        self.engine.executor.wake()
        return True

    def run(self) -> None:
        """Turn until closed. An error of the engine itself ends the loop and is told to ``on_stop``."""
        engine = self.engine
        try:
            while not self._closing:
                self._drain_inbox()
                # with nothing to do, the executor sleeps until it is woken
                outputs = engine.step(until=None if engine.has_work else float("inf"))
                if outputs:
                    self._sink(outputs, engine.executor.now)
        except BaseException as error:  # every caller must hear of it, or would wait for ever
            self._dead = error
        finally:
            self._stop()

    def _drain_inbox(self) -> None:
        while True:
            try:
                function = self._inbox.get_nowait()
            except queue.Empty:
                return
            function()

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
        while not self._inbox.empty():  # what was posted but never run must be heard of as well
            with suppress(Exception):
                self._inbox.get_nowait()()
        self._on_stop(self._dead)


class LocalPort:
    """The engine, for trackers that live in its own thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(
        self, first_id: int, prompt_token_ids: list[int], params: SamplingParams, *, priority: int, arrival: float
    ) -> None:
        """``params.n`` requests of one prompt, with ids from ``first_id`` on. A refusal is one of them all."""
        added: list[int] = []
        try:
            for index in range(params.n):
                own = params_of_output(params, index)
                self._engine.add(first_id + index, prompt_token_ids, own, priority=priority, arrival=arrival)
                added.append(first_id + index)
        except Exception:
            self.finish(added, "abort")
            raise

    def finish(self, request_ids: Sequence[int], reason: str) -> None:
        """End requests now; ids of those that have ended already are passed over."""
        for request_id in request_ids:
            self._engine.finish(request_id, reason)


def params_of_output(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of ``n`` outputs: each has a seed of its own, the first one the request's. The prompt's
    log-probabilities are asked for once."""
    changes: dict[str, Any] = {}
    if index and params.seed is not None:
        changes["seed"] = (params.seed + index * 0x9E3779B97F4A7C15) % 2**64
    if index and params.prompt_logprobs is not None:
        changes["prompt_logprobs"] = None
    return replace(params, **changes) if changes else params
