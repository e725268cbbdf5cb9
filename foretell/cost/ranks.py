"""A step on several ranks: what each stage's shard takes, from the whole model's profile and the shard's shapes.

Reads and operations of the linear layers go down with the shard's share of the weights, attention with its share of
heads, everything with the stage's share of layers. What a layer takes beyond its bytes and operations (launches,
tails) does not go down with tensor parallelism. On top come the collectives.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from foretell.config import ModelSpec
from foretell.core.messages import Batch, Chunk
from foretell.cost.grid import Curve
from foretell.cost.links import Link
from foretell.cost.operations import MATRICES
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.model.parameters import count_parameters
from foretell.parallel.layout import Layout, shard_spec


@dataclass(frozen=True, slots=True)
class Shares:
    """What one rank of a stage has of the whole model: of the matrices of a layer, of the key/value heads, of the
    query heads, of the vocabulary; and of the layers."""

    matrices: float
    kv_heads: float
    heads: float
    vocabulary: float
    layers: float


def shares(spec: ModelSpec, layout: Layout, stage: int) -> Shares:
    shard = shard_spec(spec, layout.tp)
    whole, part = (sum(count_parameters(s).layer.get(name, 0) for name in MATRICES) for s in (spec, shard))
    return Shares(
        part / whole,
        shard.num_kv_heads / spec.num_kv_heads,
        shard.num_heads / spec.num_heads,
        shard.vocab_size / spec.vocab_size,
        len(layout.stages[stage]) / spec.num_layers,
    )


def stage_profile(
    profile: Profile, layout: Layout, stage: int, *, layer_seconds: float = 0.0, parts: int = 1
) -> Profile:
    """Of one rank of this stage. ``layer_seconds``: what each layer takes whatever it holds. ``parts``: so many ranks
    share one device (CPU processes), each with its part of it."""
    spec, layers = profile.spec, layout.stages[stage]
    share = shares(spec, layout, stage)
    fixed = layer_seconds * spec.num_layers
    last = stage == layout.pp - 1

    def linear(curve: Curve) -> Curve:
        least = min(fixed, curve.y[0])  # it cannot be more than what was measured
        return Curve(curve.x, tuple(share.layers * (least + (y - least) * share.matrices) * parts for y in curve.y))

    return replace(
        profile,
        spec=replace(spec, num_layers=len(layers), windows=tuple(spec.windows[layer] for layer in layers)),
        linear=linear(profile.linear),
        decode_linear=None if profile.decode_linear is None else linear(profile.decode_linear),
        eager_seconds=profile.eager_seconds * share.layers,
        head=profile.head.scaled(share.vocabulary * parts if last else 0.0),
        host=profile.host if stage == 0 else Curve((1.0,), (0.0,)),
        decode_rate=profile.decode_rate.scaled(share.kv_heads * share.layers * parts),
        prefill_rate=profile.prefill_rate.scaled(share.heads * share.layers * parts),
    )


@dataclass(frozen=True, slots=True)
class StageTraffic:
    """What a stage says to others in one step, per token and per sampled row."""

    sums: int
    sum_bytes_per_token: int  # of each sum
    norm_sums: int
    gather_bytes_per_row: int  # 0: nothing is gathered
    send_bytes_per_token: int  # 0: it is the last stage


def stage_traffic(spec: ModelSpec, layout: Layout, stage: int, element_bytes: int) -> StageTraffic:
    """Two sums for each layer, one for the embedding; the logits of sampled rows; hidden states to the next stage.
    All stages together: ``parallel.volume``."""
    layers, split, last = len(layout.stages[stage]), layout.tp > 1, stage == layout.pp - 1
    padded = -(-spec.vocab_size // layout.tp) * layout.tp
    return StageTraffic(
        sums=(2 * layers + (stage == 0)) * split,
        sum_bytes_per_token=spec.hidden_size * element_bytes,
        norm_sums=2 * layers * (split and spec.qk_norm == "full"),
        gather_bytes_per_row=padded * 4 * (split and last),
        send_bytes_per_token=0 if last else spec.hidden_size * element_bytes,
    )


StepKind = tuple[int, int, int, bool]  # tokens, sampled rows, sequences, whether all are decodes


class StageCost:
    """Seconds of a batch on one stage, talking included; callable, so that a virtual executor can take it. ``seen``
    counts its steps by kind and ``seconds_of`` adds up their seconds: what those went into is found afterwards.

    ``factor`` multiplies every step: for the ends of the profile's interval."""

    def __init__(
        self, profile: Profile, layout: Layout, stage: int, link: Link, traffic: StageTraffic, *, factor: float = 1.0
    ) -> None:
        """``profile``: the stage's own."""
        self.step = StepCost(profile)
        self.layout, self.stage, self.link, self.traffic, self.factor = layout, stage, link, traffic, factor
        self.seen: defaultdict[StepKind, int] = defaultdict(int)
        self.seconds_of: defaultdict[StepKind, float] = defaultdict(float)
        self._talk: dict[tuple[int, int], float] = {}
        self._lines: dict[int, DecodeLine] = {}

    @property
    def busy_seconds(self) -> float:
        return sum(self.seconds_of.values())

    def __call__(self, batch: Batch) -> float:
        return self._accounted(self.step(batch), batch.chunks)

    def with_decodes(self, chunks: Sequence[Chunk], decodes: int, kv_tokens: int) -> float:
        """The same with one more token for each of so many sequences, with so many keys together."""
        return self._accounted(self.step.with_decodes(chunks, decodes, kv_tokens), chunks, decodes)

    def _accounted(self, step_seconds: float, chunks: Sequence[Chunk], decodes: int = 0) -> float:
        tokens = sum([chunk.length for chunk in chunks]) + decodes
        sampled = sum([chunk.sample for chunk in chunks]) + decodes
        sequences = len(chunks) + decodes
        seconds = (step_seconds + self.talk_seconds(tokens, sampled)) * self.factor
        kind = (tokens, sampled, sequences, tokens == sequences)
        self.seen[kind] += 1
        self.seconds_of[kind] += seconds
        return seconds

    def decode_seconds(self, positions: Sequence[int]) -> Iterator[float]:
        """Of consecutive steps of one token for each sequence; ``decoded`` says afterwards how many were taken."""
        talk = self.talk_seconds(len(positions), len(positions))
        count = len(positions)
        line = self._lines.get(count)
        if line is None:
            line = self._lines[count] = DecodeLine.of(self.step, count)
        for seconds in consecutive_decodes(self.step, positions, line):
            yield (seconds + talk) * self.factor

    def decoded(self, sequences: int, steps: int, seconds: float) -> None:
        """So many steps of a stretch of decodes were taken and took so long together."""
        kind = (sequences, sequences, sequences, True)
        self.seen[kind] += steps
        self.seconds_of[kind] += seconds

    def talk_seconds(self, tokens: int, sampled: int) -> float:
        """Collectives within the stage, and the transfer to the next one."""
        found = self._talk.get((tokens, sampled))
        if found is None:
            found = self._talk[tokens, sampled] = self._talking(tokens, sampled)
        return found

    def _talking(self, tokens: int, sampled: int) -> float:
        told, link, tp = self.traffic, self.link, self.layout.tp
        seconds = told.sums * link.sum_seconds(tp, told.sum_bytes_per_token * tokens)
        seconds += told.norm_sums * link.sum_seconds(tp, 4 * tokens)
        if told.gather_bytes_per_row and sampled:
            seconds += link.gather_seconds(tp, told.gather_bytes_per_row * sampled)
        if told.send_bytes_per_token:
            seconds += link.send_seconds(told.send_bytes_per_token * tokens)
        return seconds


@dataclass(frozen=True, slots=True)
class DecodeLine:
    """What decode steps of so many sequences take, by the logarithm of their mean history: ``pieces`` are (end, value
    at 0, slope) of each straight piece of the seconds per key, which hold up to ``most`` keys together."""

    fixed: float
    host: float
    least: float
    hidden: bool
    most: int
    pieces: tuple[tuple[float, float, float], ...]

    @classmethod
    def of(cls, step: StepCost, count: int) -> DecodeLine:
        profile = step.profile
        parts = step.without_histories(count, count, count, decodes=True)
        most = int(profile.decode_rate.reach(count) * count)
        if step.windowed or max(step.decode_linear.excess(count), profile.head.excess(count)):
            most = 0
        pieces = tuple(_pieces(profile.decode_rate.row(count)))
        return cls(parts.linear + parts.head, parts.host, parts.least, parts.hidden, most, pieces)


def consecutive_decodes(step: StepCost, positions: Sequence[int], line: DecodeLine | None = None) -> Iterator[float]:
    """``step.decode_seconds`` in a fraction of its time, for as long as the histories stay within what was measured:
    the rate is looked up among points of this number of sequences alone."""
    count, keys = len(positions), sum(positions) + len(positions)
    line = line or DecodeLine.of(step, count)
    fixed, host, least, hidden, most = line.fixed, line.host, line.least, line.hidden, line.most
    pieces, end, base, slope = iter(line.pieces), -math.inf, 0.0, 0.0
    log2 = math.log2
    while keys <= most:
        x = log2(keys / count)
        while x > end:
            end, base, slope = next(pieces)
        device = fixed + keys * (base + slope * x)
        if device < least:
            device = least
        step.steps += 1
        yield max(device, host) if hidden else device + host
        keys += count
    if not step.windowed:
        each, more = divmod(keys - count, count)
        positions = [each + 1] * more + [each] * (count - more)
    yield from step.decode_seconds(positions)


def _pieces(row: Curve) -> Iterator[tuple[float, float, float]]:
    """(end, value at 0, slope) of each straight piece of a curve that is constant outside its points."""
    yield row.x[0], row.y[0], 0.0
    for (x, y), (right, above) in pairwise(zip(row.x, row.y, strict=True)):
        slope = (above - y) / (right - x)
        yield right, y - slope * x, slope
    yield math.inf, row.y[-1], 0.0
