"""The virtual executor: a clock that jumps and a cost function instead of a device. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice

from foretell.core.messages import Batch, Chunk, ChunkResult, Result
from foretell.core.params import SamplingParams
from foretell.core.request import Request

VIRTUAL_EOS = -1  # the token id that ends a virtual request; give it as a stop id


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of a step = fixed + per token computed + per KV token read. A first, plain cost function."""

    step_seconds: float = 0.005
    seconds_per_token: float = 0.0005
    seconds_per_kv_token: float = 2e-8

    def __call__(self, batch: Batch) -> float:
        return self.with_decodes(batch.chunks, 0, 0)

    def with_decodes(self, chunks: Sequence[Chunk], decodes: int, kv_tokens: int) -> float:
        """The same of these chunks and of one token for each of so many others, with so many keys together."""
        tokens = sum(chunk.length for chunk in chunks) + decodes
        kv_tokens += sum(chunk.start + chunk.length for chunk in chunks)
        return self.step_seconds + self.seconds_per_token * tokens + self.seconds_per_kv_token * kv_tokens

    def decode_seconds(self, positions: Sequence[int]) -> Iterator[float]:
        """Of consecutive steps of one token for each sequence, the first one at these positions."""
        each, kv_tokens = len(positions), sum(positions)
        fixed = self.step_seconds + self.seconds_per_token * each
        while True:
            kv_tokens += each
            yield fixed + self.seconds_per_kv_token * kv_tokens


class VirtualExecutor:
    """Batches take the time the cost function says, one after another. Output lengths are its secret: the
    scheduler learns that a request ends when VIRTUAL_EOS comes, as it would from a model."""

    def __init__(
        self,
        cost: Callable[[Batch], float],
        num_blocks: tuple[int, ...],
        *,
        depth: int = 1,
        chain: int = 0,
        output_lengths: Mapping[int, int] | None = None,
    ) -> None:
        self.cost = cost
        self.num_blocks = num_blocks
        self.depth = depth
        self.chain = chain
        self.now = 0.0
        self.most_tokens = self.longest_chunk = 0  # of any step so far
        self._lengths = output_lengths or {}
        self._emitted: dict[int, int] = {}  # by request: output tokens so far, kept over preemptions
        self._queue: deque[Result] = deque()
        self._busy_until = 0.0

    def prepare(self, params: SamplingParams) -> None:
        """Nothing is compiled in virtual time."""

    def submit(self, batch: Batch) -> None:
        started, finished = self._schedule(batch)
        lengths = [chunk.length for chunk in batch.chunks]
        self.most_tokens = max(self.most_tokens, sum(lengths))
        self.longest_chunk = max(self.longest_chunk, max(lengths))
        for added in batch.added:
            self._emitted[added.request_id] = len(added.output_token_ids)
        self._queue.append(Result(batch.id, self._sampled(batch.chunks), started, finished))

    def _schedule(self, batch: Batch) -> tuple[float, float]:
        """When a batch submitted now starts and ends."""
        started = max(self.now, self._busy_until)
        self._busy_until = started + self.cost(batch)
        return started, self._busy_until

    def _sampled(self, chunks: Sequence[Chunk]) -> list[ChunkResult]:
        """One token for each chunk that asks for one."""
        emitted, lengths, results = self._emitted, self._lengths, []
        for chunk in chunks:
            if chunk.sample:
                request_id = chunk.request_id
                index = emitted[request_id]
                emitted[request_id] = index + 1
                ends = bool(lengths) and index + 1 >= lengths.get(request_id, 2**62)
                token = VIRTUAL_EOS if ends else _TOKENS[(request_id * _STRIDE + index) % _MODULUS]
                results.append(ChunkResult(request_id, token))
        return results

    def decode_ahead(
        self, requests: Sequence[Request], most: int, until: float | None
    ) -> tuple[list[list[int]], list[float]]:
        """Up to ``most`` steps of one token for each: the tokens by request, and when each step ended. None of them
        ends a request, and none ends after ``until``. With a batch in flight the first of the steps is that one, and
        the last one's successor is in flight afterwards."""
        if any(request.stop_ids - {VIRTUAL_EOS} for request in requests):
            return [], []
        overlapped = len(self._queue)
        emitted = [self._emitted[request.id] - overlapped for request in requests]
        lengths = [self._lengths.get(request.id, 2**62) for request in requests]
        most = min(most, *(length - count - 1 for length, count in zip(lengths, emitted, strict=True)))
        limit = math.inf if until is None else until
        steps = self._decode_seconds([request.planned for request in requests])
        began = now = max(self.now, self._busy_until)
        finished = [now] if overlapped and most > 0 and now <= limit else []
        for seconds in islice(steps, max(0, most - overlapped)) if finished or not overlapped else ():
            if now + seconds > limit:
                break
            now += seconds
            finished.append(now)
        if not finished:
            return [], []
        self.now = self._busy_until = now
        self.most_tokens = max(self.most_tokens, len(requests))
        if overlapped:
            self._overlap(requests, now, len(finished))
        self._account(len(requests), len(finished), self._busy_until - began)
        tokens = []
        for request, first in zip(requests, emitted, strict=True):
            end = first + len(finished)
            self._emitted[request.id] = end + overlapped
            tokens.append(synthetic_run(request.id, first, end))
        return tokens, finished

    def _overlap(self, requests: Sequence[Request], now: float, steps: int) -> None:
        """Put the batch in flight whose tokens come after ``steps`` more."""
        seconds = next(self._decode_seconds([request.planned + steps - 1 for request in requests]))
        self._busy_until = now + seconds
        batch_id = self._queue.popleft().batch_id + steps
        results = []
        for request in requests:
            index = self._emitted[request.id] - 1 + steps
            ends = index + 1 >= self._lengths.get(request.id, 2**62)
            results.append(ChunkResult(request.id, VIRTUAL_EOS if ends else synthetic_token(request.id, index)))
        self._queue.append(Result(batch_id, results, now, self._busy_until))

    def _account(self, sequences: int, steps: int, seconds: float) -> None:
        """Let the cost function know of a stretch, if it keeps accounts."""
        decoded = getattr(self.cost, "decoded", None)
        if decoded is not None:
            decoded(sequences, steps, seconds)

    def _decode_seconds(self, positions: list[int]) -> Iterator[float]:
        """Seconds of a step of one token at each of the positions, then at the next ones, and so on."""
        steps = getattr(self.cost, "decode_seconds", None)
        if steps is not None:
            yield from steps(positions)
            return
        for step in count():
            chunks = [Chunk(i, position + step, 1, (), True) for i, position in enumerate(positions)]
            yield self.cost(Batch(-1, chunks))

    def wait(self, until: float | None) -> Result | None:
        if self._queue and (until is None or self._queue[0].finished <= until):
            result = self._queue.popleft()
            self.now = max(self.now, result.finished)
            return result
        if until is not None:
            self.now = max(self.now, until)
        return None

    def wake(self) -> None:
        """Nothing waits in virtual time."""

    def close(self) -> None:
        """Nothing to free."""


_MULTIPLIER, _MODULUS, _STRIDE = 2_654_435_761, 50_000, 1_000_003
_TOKENS = [n * _MULTIPLIER % _MODULUS for n in range(_MODULUS)]


def synthetic_token(request_id: int, index: int) -> int:
    """A token id that depends on request and output position alone (Knuth's multiplicative hash)."""
    return _TOKENS[(request_id * _STRIDE + index) % _MODULUS]


def synthetic_run(request_id: int, first: int, end: int) -> list[int]:
    """The tokens of the output positions [first, end)."""
    start, count = (request_id * _STRIDE + first) % _MODULUS, end - first
    if start + count <= _MODULUS:
        return _TOKENS[start : start + count]
    return [synthetic_token(request_id, index) for index in range(first, end)]
