"""The floor under a step: the bytes it must move and the operations it must do, over what the hardware gives.

Two kinds of terms, as in the model itself. The linear layers and the MLP see each token alone: their cost
takes the token count and nothing else. Attention compares each token with its past: its cost takes KV lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from foretell.config import ModelSpec
from foretell.core.messages import Batch
from foretell.cost import operations
from foretell.cost.hardware import BYTES_PER_ELEMENT, Hardware
from foretell.model.parameters import count_parameters


class Span(Protocol):
    """What matters of a batch's chunk."""

    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def sample(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Tokens [start, start + length) of one sequence; ``sample``: its last one goes through the head."""

    start: int
    length: int
    sample: bool = True


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step must read, write and compute, by kind."""

    weight_bytes: float
    kv_bytes: float
    linear_flops: float
    attention_flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of the weights as they are kept: all layers and the final norm, the head, one embedding row."""

    layers: float
    head: float
    embedding_row: float

    @classmethod
    def in_dtype(cls, spec: ModelSpec, dtype: str) -> WeightBytes:
        """All of them in one dtype."""
        counts, element = count_parameters(spec), BYTES_PER_ELEMENT[dtype]
        layers = counts.per_layer * counts.num_layers + counts.final_norm
        return cls(layers * element, spec.vocab_size * spec.hidden_size * element, spec.hidden_size * element)


class FloorCost:
    """Seconds at least, of a batch on this hardware: callable, so that a virtual executor can take it."""

    def __init__(self, spec: ModelSpec, hardware: Hardware, dtype: str, weights: WeightBytes | None = None) -> None:
        """``dtype``: of the KV cache and, unless ``weights`` says otherwise, the weights."""
        element = BYTES_PER_ELEMENT[dtype]
        counts = count_parameters(spec)
        self.head_parameters = spec.vocab_size * spec.hidden_size
        self.weights = weights or WeightBytes.in_dtype(spec, dtype)
        self.matrix_parameters = counts.num_layers * sum(counts.layer.get(part, 0) for part in operations.MATRICES)
        kv_bytes_per_token_layer = spec.kv_bytes_per_token(element) // spec.num_layers
        flops_per_pair_layer = operations.score_flops(spec, 1)
        self.kv_groups = [
            (group.window, len(group.layers) * kv_bytes_per_token_layer, len(group.layers) * flops_per_pair_layer)
            for group in spec.kv_groups
        ]
        self.read_bytes_per_second = hardware.read_bytes_per_second
        self.flops_per_second = hardware.rate(dtype)

    def __call__(self, batch: Batch) -> float:
        return self.seconds(self.work(batch.chunks))

    def decode_seconds(self, positions: Sequence[int]) -> Iterator[float]:
        """Of consecutive steps of one token for each sequence, the first one at these positions."""
        first = self.work(ChunkShape(position, 1) for position in positions)
        if any(window is not None for window, _, _ in self.kv_groups):
            for step in count():
                yield self.seconds(self.work(ChunkShape(position + step, 1) for position in positions))
        kv_growth = len(positions) * sum(bytes_per_token for _, bytes_per_token, _ in self.kv_groups)
        flops_growth = len(positions) * sum(flops_per_pair for _, _, flops_per_pair in self.kv_groups)
        moved, computed = first.bytes, first.flops
        while True:
            yield max(moved / self.read_bytes_per_second, computed / self.flops_per_second)
            moved += kv_growth
            computed += flops_growth

    def seconds(self, work: StepWork) -> float:
        """max(bytes ÷ bandwidth, FLOPs ÷ rate): perfect overlap of reading and computing."""
        return max(work.bytes / self.read_bytes_per_second, work.flops / self.flops_per_second)

    def work(self, chunks: Iterable[Span]) -> StepWork:
        """Weights are read once for all tokens, the head only when something is sampled, and of the input
        embedding only the tokens' rows. Keys and values of the past are read, those of new tokens written."""
        num_tokens = num_sampled = 0
        kv_bytes = attention_flops = 0.0
        for chunk in chunks:
            num_tokens += chunk.length
            num_sampled += chunk.sample
            for window, bytes_per_token, flops_per_pair in self.kv_groups:
                past = chunk.start if window is None else min(chunk.start, window - 1)
                kv_bytes += (past + chunk.length) * bytes_per_token
                attention_flops += visible_pairs(chunk.start, chunk.length, window) * flops_per_pair
        weights = self.weights
        return StepWork(
            weight_bytes=weights.layers + (weights.head if num_sampled else 0) + num_tokens * weights.embedding_row,
            kv_bytes=kv_bytes,
            linear_flops=2.0 * (self.matrix_parameters * num_tokens + self.head_parameters * num_sampled),
            attention_flops=attention_flops,
        )


def visible_pairs(start: int, length: int, window: int | None) -> int:
    """Query-key pairs of causal attention for positions [start, start + length): each token sees itself and
    what is before it, within the window."""
    return operations.visible_pairs(start + length, window) - operations.visible_pairs(start, window)
