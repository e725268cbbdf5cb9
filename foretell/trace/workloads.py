"""Workloads: requests as plain data. Token ids are given, or made when wanted from lengths and block hashes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from foretell.errors import ConfigError
from foretell.trace.synthetic import rotated, synthetic_tokens, token_range

TokenPair = tuple[list[int], int]  # prompt token ids, output tokens


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. ``arrival_seconds`` counts from the start of the workload.

    Without ``prompt_token_ids`` the prompt is synthetic: ``block_hashes`` says which stretches of
    ``block_tokens`` tokens it shares with other requests, and the rest is its own. ``prompt_text`` is what a
    trace says in words, where it does and nothing has cut it.
    """

    prompt_len: int
    output_len: int
    arrival_seconds: float = 0.0
    prompt_token_ids: Sequence[int] | None = None
    block_hashes: tuple[int, ...] = ()
    block_tokens: int = 512
    prompt_text: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    description: str
    requests: tuple[TraceRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(r.prompt_len for r in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(r.output_len for r in self.requests)

    def token_ids(self, index: int, vocab_size: int, *, variant: int = 0) -> list[int]:
        """The prompt of request ``index``. Variants have the same lengths and the same sharing among
        themselves, but share nothing with each other: a repeat does not live off its predecessor's cache."""
        request = self.requests[index]
        if request.prompt_token_ids is None:
            return synthetic_tokens(request, index, vocab_size, variant)
        return rotated(request.prompt_token_ids, vocab_size, variant)

    def arriving_at(self, seconds: Sequence[float]) -> Workload:
        """The same requests at other times (one for each, in order)."""
        timed = (replace(request, arrival_seconds=at) for request, at in zip(self.requests, seconds, strict=True))
        return replace(self, requests=tuple(timed))

    def adjusted(
        self,
        *,
        time_scale: float = 1.0,
        duration_seconds: float | None = None,
        max_requests: int | None = None,
        max_prompt_tokens: int | None = None,
        max_output_tokens: int | None = None,
    ) -> Workload:
        """Gaps multiplied by ``time_scale`` (0.5: twice as fast), requests after ``duration_seconds`` or beyond
        ``max_requests`` left out, lengths cut to the caps (a cut prompt keeps its beginning)."""
        if not time_scale >= 0:
            raise ConfigError(f"time_scale multiplies the gaps between arrivals and must be ≥ 0, got {time_scale!r}")
        kept = []
        for request in self.requests[:max_requests]:
            arrival = request.arrival_seconds * time_scale
            if duration_seconds is not None and arrival >= duration_seconds:
                break
            kept.append(_capped(replace(request, arrival_seconds=arrival), max_prompt_tokens, max_output_tokens))
        if not kept:
            raise ConfigError(f"no request of {self.name} is left: raise the duration or the number of requests")
        return replace(self, description=self._told(kept), requests=tuple(kept))

    def _told(self, kept: Sequence[TraceRequest]) -> str:
        """The description, with what has been left out or cut."""
        first = f"the first {len(kept)} of " if len(kept) < len(self.requests) else ""
        pairs = list(zip(kept, self.requests, strict=False))
        cut = [
            f"{name} cut to {max(getattr(short, field) for short, _ in pairs)}"
            for name, field in (("prompts", "prompt_len"), ("outputs", "output_len"))
            if any(getattr(short, field) < getattr(whole, field) for short, whole in pairs)
        ]
        return ", ".join([first + self.description, *cut])


def _capped(request: TraceRequest, max_prompt: int | None, max_output: int | None) -> TraceRequest:
    prompt_len = request.prompt_len if max_prompt is None else min(request.prompt_len, max_prompt)
    output_len = request.output_len if max_output is None else min(request.output_len, max_output)
    ids = request.prompt_token_ids
    return replace(
        request,
        prompt_len=prompt_len,
        output_len=output_len,
        prompt_token_ids=None if ids is None else ids[:prompt_len],
        prompt_text=request.prompt_text if prompt_len == request.prompt_len else None,
    )


# -- synthetic workloads ----------------------------------------------------------------------------------


def _workload(name: str, description: str, pairs: Sequence[TokenPair]) -> Workload:
    requests = (TraceRequest(len(ids), output_len, prompt_token_ids=ids) for ids, output_len in pairs)
    return Workload(name, description, tuple(requests))


def fixed_pairs(count: int, prompt_len: int, output_len: int, vocab_size: int, seed: int) -> list[TokenPair]:
    """``count`` random prompts, all of one length."""
    rng, (low, high) = random.Random(seed), token_range(vocab_size)
    return [([rng.randrange(low, high) for _ in range(prompt_len)], output_len) for _ in range(count)]


def uniform_pairs(count: int, shortest: int, longest: int, vocab_size: int, seed: int) -> list[TokenPair]:
    """Random prompts with prompt and output lengths uniform in [shortest, longest]."""
    rng, (low, high) = random.Random(seed), token_range(vocab_size)
    pairs = []
    for _ in range(count):
        prompt_len = rng.randint(shortest, longest)
        ids = [rng.randrange(low, high) for _ in range(prompt_len)]
        pairs.append((ids, rng.randint(shortest, longest)))
    return pairs


def _uniform_prompts(count: int, low: int, high: int, output_len: int, vocab: int, seed: int) -> list[TokenPair]:
    return [(ids, output_len) for ids, _ in uniform_pairs(count, low, high, vocab, seed)]


# Name → description, and what builds it for a vocabulary. The seeds are part of the definition: the first six
# are the requests that every engine in our tables was measured on.
NAMED: dict[str, tuple[str, Callable[[int], list[TokenPair]]]] = {
    "decode-b1": ("batch 1, 128 in, 256 out", lambda v: fixed_pairs(1, 128, 256, v, 1)),
    "decode-b32": ("batch 32, 128 in, 256 out", lambda v: fixed_pairs(32, 128, 256, v, 2)),
    "decode-b32-long": ("batch 32, 8192 in, 128 out", lambda v: fixed_pairs(32, 8192, 128, v, 3)),
    "prefill": ("32 prompts of 4096, 1 out", lambda v: fixed_pairs(32, 4096, 1, v, 4)),
    "offline-256": ("256 requests, 100..1024 in and out", lambda v: uniform_pairs(256, 100, 1024, v, 5)),
    "offline-1024": ("1024 requests, 100..512 in and out", lambda v: uniform_pairs(1024, 100, 512, v, 6)),
    "cpu-decode": ("batch 1, 128 in, 128 out", lambda v: fixed_pairs(1, 128, 128, v, 11)),
    "cpu-prefill-1024": ("1 prompt of 1024, 1 out", lambda v: fixed_pairs(1, 1024, 1, v, 12)),
    "cpu-16": ("16 requests, 64..256 in, 128 out", lambda v: _uniform_prompts(16, 64, 256, 128, v, 13)),
}


def named_workload(name: str, vocab_size: int) -> Workload:
    """The workload of this name. ConfigError lists the names when it is none of them."""
    if name not in NAMED:
        raise ConfigError(f"unknown workload {name!r}: choose one of {', '.join(NAMED)}")
    description, build = NAMED[name]
    return _workload(name, description, build(vocab_size))


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens: "128" is fixed, "64-256" uniform with both ends, "200~50" normal
    with mean 200 and standard deviation 50, cut off below 1."""

    low: float
    high: float
    normal: bool = False  # then low is the mean and high the standard deviation

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ConfigError for anything else."""
        for mark, normal in (("~", True), ("-", False)):
            first, found, second = text.partition(mark)
            if found and _is_number(first) and _is_number(second):
                low, high = float(first), float(second)
                if low >= 1 and (normal or low <= high):
                    return cls(low, high, normal)
        if _is_number(text) and float(text) >= 1:
            return cls(float(text), float(text))
        raise ConfigError(f"{text!r} is no length in tokens: write 128, a range 64-256, or mean~deviation 200~50")

    def draw(self, rng: random.Random) -> int:
        if self.normal:
            return max(1, round(rng.gauss(self.low, self.high)))
        return rng.randint(int(self.low), int(self.high))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def random_workload(count: int, prompt: Lengths, output: Lengths, seed: int) -> Workload:
    """``count`` requests with drawn lengths; their tokens are synthetic and shared with nobody."""
    rng = random.Random(seed)
    requests = tuple(TraceRequest(prompt.draw(rng), output.draw(rng)) for _ in range(count))
    return Workload("random", f"{count} requests of random lengths", requests)
