"""The engine in a thread of its own, and the requests on their way through it.

Callers hand over requests and get snapshots through a callback; a KeyboardInterrupt in the caller's thread can
therefore never tear a step apart. Used by ``LLM`` (a queue) and ``AsyncLLM`` (an event loop).
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.core.request import Request
from foretell.core.scheduler import Output
from foretell.errors import ForetellError
from foretell.output import CompletionOutput, RequestMetrics, RequestOutput, TextStream
from foretell.store import IncrementalDetokenizer

if TYPE_CHECKING:
    from foretell.store import Tokenizer

Callback = Callable[["Update"], None]


@dataclass(slots=True)
class Update:
    """News for a caller: the request's state so far, which output grew, and by what. ``error`` is set, alone,
    when the request was refused or the engine died."""

    output: RequestOutput
    index: int = 0
    delta_text: str = ""
    delta_token_ids: Sequence[int] = ()
    finish_reason: str | None = None
    error: BaseException | None = None


class Tracker:
    """One caller's request: ``n`` engine requests and the output they add up to."""

    def __init__(self, output: RequestOutput, params: SamplingParams, callback: Callback) -> None:
        self.output = output
        self.params = params
        self.callback = callback
        self.engine_ids: list[int] = []
        self.requests: list[Request] = []
        self.texts: list[TextStream] = []


class EngineService:
    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, *, kv_bytes: Callable[[int], int] = lambda tokens: 0
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.kv_bytes = kv_bytes  # K and V that so many tokens of a request take
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._owners: dict[int, tuple[Tracker, int]] = {}
        self._lock = threading.Lock()  # nothing may enter the inbox once the engine's thread has emptied it for good
        self._stopped = False
        self._closing = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="foretell-engine", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------------

    def submit(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        callback: Callback,
        *,
        arrival: float,
        priority: int = 0,
    ) -> Tracker:
        """Queue a request; ``callback`` is called in the engine's thread with each update."""
        outputs = [CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        state = RequestOutput(next(self._ids), prompt, prompt_token_ids, outputs, RequestMetrics(arrival))
        tracker = Tracker(state, params, callback)
        self._post(lambda: self._start(tracker, priority))
        return tracker

    def abort(self, tracker: Tracker) -> None:
        """End a request; its last update has finish_reason "abort". Nothing happens if it has ended."""
        with suppress(ForetellError):  # stopped meanwhile: it has been told already
            self._post(lambda: self._abort(tracker))

    def call(self, function: Callable[[Engine], None]) -> Future[None]:
        """Run a function on the engine between two steps. The future is for who wants to wait, or hear of errors."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                function(self.engine)
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._post(run)
        return done

    def close(self) -> None:
        """Stop after the step in progress; unfinished requests are aborted."""
        if self._closing:
            return
        self._closing = True
        self.engine.executor.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self.engine.executor.close()

    def _post(self, function: Callable[[], None]) -> None:
        with self._lock:
            if self._stopped or self._closing:
                raise ForetellError(f"the engine has stopped{f': {self._dead}' if self._dead else ''}")
            self._inbox.put(function)
        self.engine.executor.wake()

    # -- the engine's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._drain_inbox()
                # with nothing to do, the executor sleeps until it is woken
                for output in self.engine.step(until=None if self.engine.has_work else float("inf")):
                    self._deliver_or_drop(output)
        except BaseException as error:  # every caller must hear of it, or would wait for ever
            self._dead = error
        finally:
            self._fail_all()

    def _drain_inbox(self) -> None:
        while True:
            try:
                function = self._inbox.get_nowait()
            except queue.Empty:
                return
            function()

    def _fail_all(self) -> None:
        with self._lock:
            self._stopped = True
        while not self._inbox.empty():  # requests that were posted but never started must hear of it as well
            with suppress(Exception):
                self._inbox.get_nowait()()
        error = ForetellError(f"the engine stopped: {self._dead}" if self._dead else "the engine was closed")
        for tracker in {id(t): t for t, _ in self._owners.values()}.values():
            self._tell(tracker, Update(tracker.output, error=error))
        self._owners.clear()

    def _start(self, tracker: Tracker, priority: int) -> None:
        try:
            for index in range(tracker.params.n):
                self._start_one(tracker, index, priority)
        except Exception as error:  # refused, or not what it should be: it fails alone
            self._drop(tracker, error)

    def _deliver_or_drop(self, news: Output) -> None:
        """What goes wrong between a token and its caller (an event loop that is gone) ends that request alone."""
        owner = self._owners.get(news.request_id)
        if owner is None:
            return
        try:
            self._deliver(news, *owner)
        except Exception as error:
            self._drop(owner[0], error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        for engine_id in tracker.engine_ids:
            self.engine.finish(engine_id)
            self._owners.pop(engine_id, None)
        self._tell(tracker, Update(tracker.output, error=error))

    @staticmethod
    def _tell(tracker: Tracker, update: Update) -> None:
        with suppress(Exception):  # a caller that can no longer be told must not take the others along
            tracker.callback(update)

    def _start_one(self, tracker: Tracker, index: int, priority: int) -> None:
        params, output = tracker.params, tracker.output
        engine_id = next(self._ids)
        if index and params.seed is not None:
            params = replace(params, seed=(params.seed + index * 0x9E3779B97F4A7C15) % 2**64)
        request = self.engine.add(
            engine_id, output.prompt_token_ids, params, priority=priority, arrival=output.metrics.arrival
        )
        tracker.engine_ids.append(engine_id)
        tracker.requests.append(request)
        tracker.texts.append(
            TextStream(self._detokenizer(params), params.stop, include=params.include_stop_str_in_output)
        )
        self._owners[engine_id] = (tracker, index)

    def _detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        return IncrementalDetokenizer(self.tokenizer, skip_special_tokens=params.skip_special_tokens)

    def _abort(self, tracker: Tracker) -> None:
        for index, engine_id in enumerate(tracker.engine_ids):
            if self._owners.pop(engine_id, None) is not None:
                self.engine.finish(engine_id, "abort")
                with suppress(Exception):  # who has left need not hear of it
                    self._end(tracker, index, "abort")

    def _deliver(self, news: Output, tracker: Tracker, index: int) -> None:
        completion, text = tracker.output.outputs[index], tracker.texts[index]
        self._note_times(tracker, index, news)
        delta, reason = "", news.finish_reason
        if news.token_id is not None:
            completion.token_ids.append(news.token_id)
            if completion.logprobs is not None and news.logprobs is not None:
                completion.logprobs.append(news.logprobs)
            if news.stop_token is None or tracker.params.include_stop_str_in_output:
                delta = text.push(news.token_id, may_stop=len(completion.token_ids) > tracker.params.min_tokens)
        if reason is not None:
            delta += text.finish()
            completion.stop_reason = news.stop_token
            completion.error = news.error
        if text.filter.found is not None:
            completion.stop_reason = text.filter.found
            if reason is None:
                self.engine.finish(news.request_id, "stop")
            reason = "stop"
        completion.text += delta
        if reason is not None:
            del self._owners[news.request_id]
            completion.finish_reason = reason
        token_ids = () if news.token_id is None else (news.token_id,)
        tracker.callback(Update(tracker.output, index, delta, token_ids, reason))

    def _end(self, tracker: Tracker, index: int, reason: str) -> None:
        completion = tracker.output.outputs[index]
        delta = tracker.texts[index].finish()
        completion.text += delta
        completion.finish_reason = reason
        tracker.callback(Update(tracker.output, index, delta, (), reason))

    def _note_times(self, tracker: Tracker, index: int, news: Output) -> None:
        metrics, request, now = tracker.output.metrics, tracker.requests[index], self.engine.executor.now
        if metrics.first_token is None:
            metrics.first_token = now
            metrics.first_scheduled = request.first_scheduled
            metrics.cached_tokens = request.cached_tokens
        if news.prompt_logprobs is not None and tracker.output.prompt_logprobs is None:
            tracker.output.prompt_logprobs = [None, *news.prompt_logprobs]
        metrics.last_token = now
        metrics.num_output_tokens = max(metrics.num_output_tokens, len(request.tokens) - request.prompt_len)
        metrics.preemptions = request.preemptions
        if news.finish_reason is not None:
            metrics.kv_bytes = self.kv_bytes(len(request.tokens))
