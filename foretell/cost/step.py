"""The cost model of a step: what a calibrated machine will take, with an interval and where it comes from.

It mirrors the model. Linear layers, norms, embedding and head see each token alone: their time takes the number of
tokens. Attention compares each token with what came before: its time takes the query-key pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from foretell.core.messages import Batch
from foretell.cost.floor import Span
from foretell.cost.profile import Profile, attended

Source = Literal["measured grid", "beyond the grid"]
BEYOND = 2.0  # times wider is the interval where the grid ends


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one step by component; ``low`` … ``high`` should hold 90 % of real ones."""

    linear: float
    head: float
    attention: float
    host: float
    low: float
    high: float
    source: Source

    @property
    def seconds(self) -> float:
        return self.linear + self.head + self.attention + self.host


class StepCost:
    """Callable on a batch, so that a virtual executor can take it; ``beyond`` counts steps outside the grid."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.groups, self.num_layers = profile.spec.kv_groups, profile.spec.num_layers
        self.windowed = any(group.window is not None for group in self.groups)
        self.steps = self.beyond = 0

    def __call__(self, batch: Batch) -> float:
        estimate = self.estimate(batch.chunks)
        self.steps += 1
        self.beyond += estimate.source == "beyond the grid"
        return estimate.seconds

    def estimate(self, chunks: Iterable[Span]) -> Estimate:
        """Of a step with these chunks, each of another sequence."""
        profile = self.profile
        tokens = sampled = sequences = decodes = 0
        keys = attention = 0.0
        inside = True
        for chunk in chunks:
            sequences += 1
            tokens += chunk.length
            sampled += chunk.sample
            pairs = self._pairs(chunk.start, chunk.length)
            if chunk.length == 1:
                decodes += 1
                keys += pairs
            else:
                attention += pairs * profile.prefill_rate(chunk.length, chunk.start + chunk.length)
                inside = inside and profile.prefill_rate.holds(chunk.length, chunk.start + chunk.length)
        if decodes:
            attention += keys * profile.decode_rate(decodes, keys / decodes)
            inside = inside and profile.decode_rate.holds(decodes, keys / decodes)
        inside = inside and tokens <= profile.linear.x[-1] and sampled <= profile.head.x[-1]
        return self._estimate(tokens, sampled, sequences, attention, inside)

    def decode_seconds(self, positions: Sequence[int]) -> Iterator[float]:
        """Of consecutive steps of one token for each sequence, the first one at these positions."""
        count = len(positions)
        fixed = self._estimate(count, count, count, 0.0, True).seconds
        rate = self.profile.decode_rate
        step = 0
        while True:
            if self.windowed:
                keys = sum(self._pairs(position + step, 1) for position in positions)
            else:
                keys = float(sum(positions) + count * (step + 1))
            self.steps += 1
            self.beyond += not rate.holds(count, keys / count)
            yield fixed + keys * rate(count, keys / count)
            step += 1

    def _pairs(self, start: int, length: int) -> float:
        if not self.windowed:
            return length * start + length * (length + 1) / 2
        return attended(self.groups, self.num_layers, start, length)

    def _estimate(self, tokens: int, sampled: int, sequences: int, attention: float, inside: bool) -> Estimate:
        profile = self.profile
        linear, host = profile.linear(tokens), profile.host(sequences)
        head = profile.head(sampled) if sampled else 0.0
        seconds = linear + head + attention + host
        wider = 1.0 if inside else BEYOND
        low, high = 1 - (1 - profile.low) * wider, 1 + (profile.high - 1) * wider
        source: Source = "measured grid" if inside else "beyond the grid"
        return Estimate(linear, head, attention, host, seconds * max(0.0, low), seconds * high, source)
