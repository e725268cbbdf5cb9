"""What a caller gets back, and how text grows out of token ids without ever leaking half a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foretell.core.messages import TokenLogprobs

if TYPE_CHECKING:
    from foretell.store import IncrementalDetokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` outputs. ``stop_reason`` is the stop string or token id that ended it. A request
    for an embedding has no tokens: ``embedding`` is the prompt's pooled hidden state, of length 1."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    embedding: list[float] | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the engine's clock. TTFT counts from the moment the call was accepted, before
    tokenising; ``engine_ttft_seconds`` from the moment the scheduler first gave the request room."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    kv_bytes: int = 0

    @property
    def ttft_seconds(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def engine_ttft_seconds(self) -> float | None:
        if self.first_token is None or self.first_scheduled is None:
            return None
        return self.first_token - self.first_scheduled

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per output token after the first."""
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)

    @property
    def e2e_seconds(self) -> float | None:
        return None if self.last_token is None else self.last_token - self.arrival


@dataclass(slots=True)
class RequestOutput:
    """A request's outputs so far; ``finished`` once all ``n`` have a finish_reason. ``prompt_logprobs`` has one
    entry per prompt token, None for the first, which nothing predicts."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


class StopStringFilter:
    """Passes text on, except what may yet turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self.stops = tuple(stops)
        self.include = include
        self.held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show. Once ``found`` is set nothing more comes."""
        if not self.stops or self.found is not None:
            return text if self.found is None else ""
        held = self.held + text
        hits = [(held.find(stop), stop) for stop in self.stops if stop in held]
        if hits:
            at, self.found = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self.held = ""
            return held[: at + len(self.found)] if self.include else held[:at]
        keep = max((self._overlap(held, stop) for stop in self.stops), default=0)
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The rest, when the output has ended without a stop string."""
        held, self.held = self.held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if stop.startswith(text[len(text) - n :])), 0)


class TextStream:
    """Token ids of one output → text, through the detokeniser and the stop-string filter."""

    def __init__(self, detokenizer: IncrementalDetokenizer | None, stops: Sequence[str], *, include: bool) -> None:
        self.detokenizer = detokenizer
        self.filter = StopStringFilter(stops, include=include)

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text to show; ``may_stop=False`` (below min_tokens) lets stop strings pass."""
        if self.detokenizer is None:
            return ""
        text = self.detokenizer.push([token_id])
        return self.filter.push(text) if may_stop else text

    def finish(self) -> str:
        if self.detokenizer is None or self.filter.found is not None:
            return ""
        return self.filter.push(self.detokenizer.finish()) + self.filter.flush()
