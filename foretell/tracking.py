"""From token ids to text: the requests under way, and what their callers get to see.

It runs where the callers are: in the engine's thread for ``LLM``, in the HTTP process for the server. The engine is
reached through an ``EnginePort`` only. Not thread-safe: one thread (or event loop) owns a ``Tracking``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from foretell.core.messages import Output
from foretell.core.params import SamplingParams
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


class EnginePort(Protocol):
    """The way to an engine, in this thread or in another process."""

    def add(
        self, first_id: int, prompt_token_ids: list[int], params: SamplingParams, *, priority: int, arrival: float
    ) -> None:
        """``params.n`` requests of one prompt, with ids from ``first_id`` on. May refuse with an exception."""
        ...

    def finish(self, request_ids: Sequence[int], reason: str) -> None: ...


class Tracker:
    """One caller's request: ``n`` engine requests, whose ids begin at ``first_id``, and what they add up to."""

    __slots__ = ("callback", "first_id", "open", "output", "params", "texts")

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        callback: Callback,
        arrival: float,
    ) -> None:
        outputs = [CompletionOutput(i, logprobs=None if params.logprobs is None else []) for i in range(params.n)]
        self.output = RequestOutput(request_id, prompt, prompt_token_ids, outputs, RequestMetrics(arrival))
        self.params = params
        self.callback = callback
        self.first_id = -1  # until started
        self.open = 0  # outputs under way
        self.texts: list[TextStream] = []


class Tracking:
    """All requests under way over one port. ``kv_bytes``: K and V that so many tokens of a request take."""

    def __init__(
        self, port: EnginePort, tokenizer: Tokenizer | None, kv_bytes: Callable[[int], int] = lambda tokens: 0
    ) -> None:
        self.port = port
        self.tokenizer = tokenizer
        self.kv_bytes = kv_bytes
        self._next_id = 0
        self._owners: dict[int, Tracker] = {}

    # -- the life of a request ----------------------------------------------------------------------

    def start(self, tracker: Tracker, priority: int = 0) -> None:
        """Hand it to the engine. What cannot be is told to its caller and fails alone."""
        params, output = tracker.params, tracker.output
        first = tracker.first_id = self._next_id
        self._next_id += params.n
        tracker.texts = [self._text(params) for _ in range(params.n)]
        try:
            self.port.add(first, output.prompt_token_ids, params, priority=priority, arrival=output.metrics.arrival)
        except Exception as error:
            tell(tracker, Update(output, error=error))
            return
        tracker.open = params.n
        self._owners.update(dict.fromkeys(range(first, first + params.n), tracker))

    def abort(self, tracker: Tracker) -> None:
        """End it for a caller that left; its open outputs get finish_reason "abort"."""
        for engine_id in self._close(tracker):
            with suppress(Exception):  # who has left need not hear of it
                self._end(tracker, engine_id - tracker.first_id, "abort")

    def fail(self, tracker: Tracker, error: BaseException) -> None:
        """End it with an error, unless it has ended."""
        if self._close(tracker):
            tell(tracker, Update(tracker.output, error=error))

    def fail_request(self, first_id: int, error: BaseException) -> None:
        """The engine refused the request whose ids begin there."""
        tracker = self._owners.get(first_id)
        if tracker is not None:
            self.fail(tracker, error)

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """The engine is gone: everyone hears of it, and gets an error of their own to raise."""
        owners, self._owners = self._owners, {}
        for tracker in {id(t): t for t in owners.values()}.values():
            tracker.open = 0
            tell(tracker, Update(tracker.output, error=error()))

    def end_all(self, error: Callable[[], BaseException]) -> None:
        """Take everything from a living engine, with an error for each caller."""
        for tracker in {id(t): t for t in self._owners.values()}.values():
            self.fail(tracker, error())

    def _close(self, tracker: Tracker) -> list[int]:
        """Take its open outputs from the engine; their ids."""
        ids = range(tracker.first_id, tracker.first_id + tracker.params.n) if tracker.open else ()
        still_open = [i for i in ids if self._owners.pop(i, None) is not None]
        tracker.open = 0
        if still_open:
            self.port.finish(still_open, "abort")
        return still_open

    def _text(self, params: SamplingParams) -> TextStream:
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=params.skip_special_tokens)
        return TextStream(detokenizer, params.stop, include=params.include_stop_str_in_output)

    # -- outputs of the engine ----------------------------------------------------------------------

    def take(self, outputs: Iterable[Output], now: float) -> None:
        """Pass a step's outputs on. Those of requests that have ended here are dropped; what goes wrong between
        a token and its caller (an event loop that is gone) ends that request alone."""
        for news in outputs:
            tracker = self._owners.get(news.request_id)
            if tracker is None:
                continue
            try:
                self._deliver(news, tracker, now)
            except Exception as error:
                self._close(tracker)
                tell(tracker, Update(tracker.output, error=error))

    def _deliver(self, news: Output, tracker: Tracker, now: float) -> None:
        index = news.request_id - tracker.first_id
        output, completion, text = tracker.output, tracker.output.outputs[index], tracker.texts[index]
        delta, reason, token_id = "", news.finish_reason, news.token_id
        if token_id is not None:
            completion.token_ids.append(token_id)
            if completion.logprobs is not None and news.logprobs is not None:
                completion.logprobs.append(news.logprobs)
            if news.stop_token is None or tracker.params.include_stop_str_in_output:
                delta = text.push(token_id, may_stop=len(completion.token_ids) > tracker.params.min_tokens)
        if reason is not None:
            delta += text.finish()
            completion.stop_reason = news.stop_token
            completion.error = news.error
            completion.embedding = news.embedding
        if text.filter.found is not None:
            completion.stop_reason = text.filter.found
            if reason is None:
                self.port.finish((news.request_id,), "stop")
            reason = "stop"
        self._note_times(output, completion, news, now)
        if delta:
            completion.text += delta
        if reason is not None:
            del self._owners[news.request_id]
            tracker.open -= 1
            completion.finish_reason = reason
            output.metrics.kv_bytes = self.kv_bytes(len(output.prompt_token_ids) + len(completion.token_ids))
        tracker.callback(Update(output, index, delta, () if token_id is None else (token_id,), reason))

    @staticmethod
    def _end(tracker: Tracker, index: int, reason: str) -> None:
        completion = tracker.output.outputs[index]
        delta = tracker.texts[index].finish()
        completion.text += delta
        completion.finish_reason = reason
        tracker.callback(Update(tracker.output, index, delta, (), reason))

    @staticmethod
    def _note_times(output: RequestOutput, completion: CompletionOutput, news: Output, now: float) -> None:
        metrics, progress = output.metrics, news.progress
        if progress is not None:
            if metrics.first_token is None:
                metrics.first_scheduled = progress.first_scheduled
                metrics.cached_tokens = progress.cached_tokens
            metrics.preemptions = progress.preemptions
        if metrics.first_token is None:
            metrics.first_token = now
        if news.prompt_logprobs is not None and output.prompt_logprobs is None:
            output.prompt_logprobs = [None, *news.prompt_logprobs]
        metrics.last_token = now
        metrics.num_output_tokens = max(metrics.num_output_tokens, len(completion.token_ids))


def tell(tracker: Tracker, update: Update) -> None:
    """A caller that can no longer be told must not take the others along."""
    with suppress(Exception):
        tracker.callback(update)
