"""The work of a transformer, counted by component: floating-point operations and bytes, from the spec alone.

A multiply-add is two operations. Matrix products are counted; norms, rotations, activations and the softmax
are not: they do one or a few operations per element where a product does thousands. Sources:

- linear layers, 2 operations per weight and token: Kaplan et al. 2020, "Scaling laws", table 1
- Q·Kᵀ and the sum over V, 2·keys·heads·head_dim each: Narayanan et al. 2021 (Megatron-LM), appendix
- KV cache size and what a decode step reads: Pope et al. 2022, "Efficiently scaling transformer inference"
- operations per byte against a machine's balance: Williams et al. 2009, "Roofline"
"""

from __future__ import annotations

from dataclasses import dataclass

from foretell.config import ModelSpec
from foretell.model.parameters import count_parameters

_PROJECTIONS = ("attention.q", "attention.k", "attention.v", "attention.o")
_MLP = ("mlp.gate", "mlp.up", "mlp.down")
MATRICES = _PROJECTIONS + _MLP  # of a layer


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations by component. Only ``attention_scores`` (Q·Kᵀ and the sum over V) depends on the history."""

    attention_projections: int
    attention_scores: int
    mlp: int
    head: int

    @property
    def attention(self) -> int:
        return self.attention_projections + self.attention_scores

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.head


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that must cross the memory bus once, whatever the kernels: weights, and keys and values.

    Activations are left out: they fit in caches or are small beside the weights.
    """

    attention_weights: int
    mlp_weights: int
    head_weights: int
    other_weights: int  # norms and the embedding rows looked up
    kv_read: int
    kv_written: int

    @property
    def weights(self) -> int:
        return self.attention_weights + self.mlp_weights + self.head_weights + self.other_weights

    @property
    def total(self) -> int:
        return self.weights + self.kv_read + self.kv_written


def visible_keys(tokens: int, window: int | None) -> int:
    """Keys that the last of ``tokens`` tokens sees in one layer, its own included."""
    return tokens if window is None else min(tokens, window)


def visible_pairs(tokens: int, window: int | None) -> int:
    """(query, key) pairs of a causal prefill of ``tokens`` tokens in one layer: Σ visible_keys(1 … tokens)."""
    growing = tokens if window is None else min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * growing


def score_flops(spec: ModelSpec, pairs: int) -> int:
    """Q·Kᵀ and the weighted sum of V for so many (query, key) pairs in one layer: 4·pairs·heads·head_dim.

    Heads are query heads: GQA and MQA share keys and values, which saves bytes, never operations.
    """
    return 4 * pairs * spec.num_heads * spec.head_dim


def decode_flops(spec: ModelSpec, context_tokens: int) -> Flops:
    """One decoded token that is the ``context_tokens``-th of its sequence."""
    pairs = sum(visible_keys(context_tokens, window) for window in spec.windows)
    return _flops(spec, 1, score_flops(spec, pairs))


def prefill_flops(spec: ModelSpec, prompt_tokens: int) -> Flops:
    """A whole prompt from an empty cache; the head is applied to its last token alone."""
    pairs = sum(visible_pairs(prompt_tokens, window) for window in spec.windows)
    return _flops(spec, prompt_tokens, score_flops(spec, pairs))


def _flops(spec: ModelSpec, tokens: int, scores: int) -> Flops:
    layer = count_parameters(spec).layer
    return Flops(
        attention_projections=2 * tokens * spec.num_layers * sum(layer[name] for name in _PROJECTIONS),
        attention_scores=scores,
        mlp=2 * tokens * spec.num_layers * sum(layer.get(name, 0) for name in _MLP),
        head=2 * spec.vocab_size * spec.hidden_size,
    )


def kv_bytes(spec: ModelSpec, tokens: int, bytes_per_element: int) -> int:
    """K and V that a sequence of ``tokens`` needs for its next token: a sliding layer keeps its window only."""
    kept = sum(visible_keys(tokens, window) for window in spec.windows)
    return kept * spec.kv_bytes_per_token(bytes_per_element) // spec.num_layers


def decode_traffic(spec: ModelSpec, context_tokens: int, bytes_per_element: int, batch_size: int = 1) -> Traffic:
    """One decode step of ``batch_size`` sequences of ``context_tokens`` each: weights are read once for all."""
    return _traffic(
        spec,
        bytes_per_element,
        tokens=batch_size,
        kv_read=batch_size * kv_bytes(spec, context_tokens, bytes_per_element),
    )


def prefill_traffic(spec: ModelSpec, prompt_tokens: int, bytes_per_element: int) -> Traffic:
    """A whole prompt in one step: weights once, its K and V written once and read back once (the least)."""
    written = spec.kv_bytes_per_token(bytes_per_element) * prompt_tokens
    return _traffic(spec, bytes_per_element, tokens=prompt_tokens, kv_read=written)


def _traffic(spec: ModelSpec, bytes_per_element: int, *, tokens: int, kv_read: int) -> Traffic:
    counts = count_parameters(spec)
    attention = sum(size for name, size in counts.layer.items() if name.startswith("attention."))
    mlp = sum(size for name, size in counts.layer.items() if name.startswith("mlp."))
    rows = tokens * spec.hidden_size * (2 if spec.learned_positions else 1)
    return Traffic(
        attention_weights=attention * spec.num_layers * bytes_per_element,
        mlp_weights=mlp * spec.num_layers * bytes_per_element,
        head_weights=(counts.head or counts.embedding) * bytes_per_element,  # tied: the embedding, read as a matrix
        other_weights=(counts.layer.get("norms", 0) * spec.num_layers + counts.final_norm + rows) * bytes_per_element,
        kv_read=kv_read,
        kv_written=tokens * spec.kv_bytes_per_token(bytes_per_element),
    )


def crossover_tokens(spec: ModelSpec) -> int | None:
    """The context from which on attending to the history costs a token more than its MLP; None if it never does."""
    most = 1 << 40  # longer than any context: a model that has not crossed by then never will
    if decode_flops(spec, most).attention_scores < decode_flops(spec, most).mlp:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        flops = decode_flops(spec, middle)
        low, high = (low, middle) if flops.attention_scores >= flops.mlp else (middle, high)
    return high
