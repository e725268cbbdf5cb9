"""The cost model of a step: what a calibrated machine will take, with an interval and where it comes from.

It mirrors the model. Linear layers, norms, embedding and head see each token alone: their time takes the number of
tokens. Attention compares each token with what came before: its time takes the query-key pairs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from foretell.core.messages import Batch, Chunk
from foretell.cost.floor import Span
from foretell.cost.grid import FARTHEST, BeyondProfileError
from foretell.cost.profile import Kind, Profile, attended

Source = Literal["measured grid", "interpolated", "beyond the grid", "analytic floor"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one step by component; ``low`` … ``high`` should hold 90 % of real ones.

    ``least``: what the step takes at least, whatever its components add up to (launches). ``hidden``: the host's
    seconds pass behind the device's.
    """

    linear: float
    head: float
    decode_attention: float
    prefill_attention: float
    host: float
    low: float
    high: float
    source: Source
    kind: Kind = "prefill"
    least: float = 0.0
    hidden: bool = False

    @property
    def attention(self) -> float:
        return self.decode_attention + self.prefill_attention

    @property
    def device(self) -> float:
        """Without the host: from the start of the step to its end."""
        return max(self.least, self.linear + self.head + self.attention)

    @property
    def seconds(self) -> float:
        return max(self.device, self.host) if self.hidden else self.device + self.host


class Parts(NamedTuple):
    """Seconds of a step by component, without the host's; see ``Estimate``. ``excess``: doublings off the grid."""

    linear: float
    head: float
    decode_attention: float
    prefill_attention: float
    least: float
    kind: Kind
    excess: float

    @property
    def device(self) -> float:
        return max(self.least, self.linear + self.head + self.decode_attention + self.prefill_attention)


@dataclass(slots=True)
class _Work:
    """What a step's chunks add up to; ``excess``: doublings by which they leave the grid."""

    sequences: int = 0
    tokens: int = 0
    sampled: int = 0
    decode_attention: float = 0.0
    prefill_attention: float = 0.0
    excess: float = 0.0
    kind: Kind = "decode"


class StepCost:
    """Callable on a batch, so that a virtual executor can take it; ``beyond`` counts steps outside the grid.

    BeyondProfileError is raised where a step is more than eight times as large as anything measured.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.groups, self.num_layers = profile.spec.kv_groups, profile.spec.num_layers
        self.windowed = any(group.window is not None for group in self.groups)
        self.decode_linear = profile.decode_linear or profile.linear
        self.steps = self.beyond = 0

    def __call__(self, batch: Batch) -> float:
        return self._seconds(self._work(batch.chunks))

    def with_decodes(self, chunks: Sequence[Chunk], decodes: int, kv_tokens: int) -> float:
        """Seconds of these chunks and of one token for each of so many others, with so many keys together."""
        return self._seconds(self._work(chunks, _Work(decodes, decodes, decodes), float(kv_tokens)))

    def _seconds(self, work: _Work) -> float:
        self._count(work.excess, work.tokens)
        linear, head, host = self._fixed(work)
        return self._sum(work, linear + head + work.decode_attention + work.prefill_attention, host)

    def estimate(self, chunks: Iterable[Span]) -> Estimate:
        """Of a step with these chunks, each of another sequence."""
        work, profile = self._work(chunks), self.profile
        if work.excess > FARTHEST:
            raise self._refusal(work.tokens)
        linear, head, host = self._fixed(work)
        least = 0.0 if self._has_graph(work) else profile.eager_seconds
        estimate = Estimate(
            linear, head, work.decode_attention, work.prefill_attention, host, 0.0, 0.0, self._source(work),
            work.kind, least, profile.overlaps,
        )  # fmt: skip
        low, high = profile.interval(work.kind)
        wider = 1.0 if not work.excess else 2.0 + work.excess
        seconds = estimate.seconds
        return replace(
            estimate, low=seconds * max(0.0, 1 - (1 - low) * wider), high=seconds * (1 + (high - 1) * wider)
        )

    def parts(self, chunks: list[Chunk]) -> Parts:
        """What the live check wants of a step, in a fraction of ``estimate``'s time."""
        work = self._work(chunks)
        linear, head, _ = self._fixed(work)
        least = 0.0 if self._has_graph(work) else self.profile.eager_seconds
        return Parts(linear, head, work.decode_attention, work.prefill_attention, least, work.kind, work.excess)

    def decode_seconds(self, positions: Sequence[int]) -> Iterator[float]:
        """Of consecutive steps of one token for each sequence, the first one at these positions."""
        count = len(positions)
        work = _Work(count, count, count)
        linear, head, host = self._fixed(work)
        rate = self.profile.decode_rate
        out = max(self.decode_linear.excess(count), self.profile.head.excess(count))
        step = 0
        while True:
            if self.windowed:
                keys = sum(self._pairs(position + step, 1) for position in positions)
            else:
                keys = float(sum(positions) + count * (step + 1))
            self._count(max(out, rate.excess(count, keys / count)), count)
            yield self._sum(work, linear + head + keys * rate(count, keys / count), host)
            step += 1

    def _decodes(self, chunks: Sequence[Span]) -> _Work | None:
        """The same as ``_work`` in a fraction of its time, of one token for each sequence; None if they are not."""
        count = len(chunks)
        if self.windowed or not count or sum([chunk.length for chunk in chunks]) != count:
            return None
        profile = self.profile
        keys, sampled = float(sum([chunk.start for chunk in chunks]) + count), sum([chunk.sample for chunk in chunks])
        rate, excess = profile.decode_rate, max(self.decode_linear.excess(count), profile.head.excess(sampled or 1))
        mean = keys / count
        return _Work(count, count, sampled, keys * rate(count, mean), 0.0, max(excess, rate.excess(count, mean)))

    def _work(self, chunks: Iterable[Span], beside: _Work | None = None, keys: float = 0.0) -> _Work:
        """``beside``: decodes of the same step that are known by their number and their keys alone."""
        if beside is None and isinstance(chunks, list) and (decodes := self._decodes(chunks)) is not None:
            return decodes
        profile, work = self.profile, beside or _Work()
        prefill, count = profile.prefill_rate, work.sequences
        for chunk in chunks:
            work.sequences += 1
            work.tokens += chunk.length
            work.sampled += chunk.sample
            pairs = self._pairs(chunk.start, chunk.length)
            if chunk.length == 1:
                count += 1
                keys += pairs
            else:
                work.kind = "prefill"
                end = chunk.start + chunk.length
                work.prefill_attention += pairs * prefill(chunk.length, end)
                work.excess = max(work.excess, prefill.excess(chunk.length, end))
        if count:
            work.decode_attention = keys * profile.decode_rate(count, keys / count)
            work.excess = max(work.excess, profile.decode_rate.excess(count, keys / count))
        linear = self.decode_linear if work.kind == "decode" else profile.linear
        work.excess = max(work.excess, linear.excess(work.tokens), profile.head.excess(work.sampled or 1))
        return work

    def without_histories(self, tokens: int, sampled: int, sequences: int, *, decodes: bool) -> Estimate:
        """Of a step of such a size, its attention and its interval left out."""
        kind: Kind = "decode" if decodes else "prefill"
        work = _Work(sequences, tokens, sampled, kind=kind)
        linear, head, host = self._fixed(work)
        least = 0.0 if self._has_graph(work) else self.profile.eager_seconds
        return Estimate(
            linear, head, 0.0, 0.0, host, 0.0, 0.0, self._source(work), kind, least, self.profile.overlaps
        )

    def _fixed(self, work: _Work) -> tuple[float, float, float]:
        """Seconds of linear layers, head and host, which take no lengths of histories."""
        profile, rows = self.profile, work.sampled
        if self._has_graph(work):
            rows = profile.graph_sizes[bisect_left(profile.graph_sizes, work.tokens)]
            return self.decode_linear(rows), profile.head(rows), profile.host(work.sequences)
        linear = self.decode_linear if work.kind == "decode" and not profile.graph_sizes else profile.linear
        return linear(work.tokens), profile.head(rows) if rows else 0.0, profile.host(work.sequences)

    def _has_graph(self, work: _Work) -> bool:
        sizes = self.profile.graph_sizes
        return work.kind == "decode" and bool(sizes) and work.tokens <= sizes[-1]

    def _sum(self, work: _Work, device: float, host: float) -> float:
        profile = self.profile
        if profile.eager_seconds and not self._has_graph(work):
            device = max(device, profile.eager_seconds)
        return max(device, host) if profile.overlaps else device + host

    def _pairs(self, start: int, length: int) -> float:
        if not self.windowed:
            return length * start + length * (length + 1) / 2
        return attended(self.groups, self.num_layers, start, length)

    def _source(self, work: _Work) -> Source:
        if self.profile.source == "analytic":
            return "analytic floor"
        if work.excess:
            return "beyond the grid"
        linear = self.decode_linear if work.kind == "decode" else self.profile.linear
        at_point = self.profile.source == "measured" and work.tokens in linear.x
        return "measured grid" if at_point else "interpolated"

    def _count(self, excess: float, tokens: int) -> None:
        self.steps += 1
        if excess:
            self.beyond += 1
            if excess > FARTHEST:
                raise self._refusal(tokens)

    def _refusal(self, tokens: int) -> BeyondProfileError:
        return BeyondProfileError(
            f"a step of {tokens} tokens with such histories is more than {2**FARTHEST:.0f} times what was measured "
            f"of {self.profile.model}: calibrate with more KV cache, or cap lengths"
        )
