"""Token ids out of thin air, the same on every machine: a hash of where the token stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foretell.trace.workloads import TraceRequest

OWN = 1 << 62  # block numbers from here on belong to one request alone
SPECIAL_TOKENS = 1000  # ids near both ends of a vocabulary are often special


def token_range(vocab_size: int) -> tuple[int, int]:
    """Ids [low, high) to draw from: the ends are left out where the vocabulary is large enough."""
    margin = SPECIAL_TOKENS if vocab_size > 2 * SPECIAL_TOKENS else 0
    return margin, vocab_size - margin


def synthetic_tokens(request: TraceRequest, index: int, vocab_size: int, variant: int = 0) -> list[int]:
    """The request's prompt: equal block hashes give equal tokens, everything else differs by request."""
    size, length = request.block_tokens, request.prompt_len
    low, high = token_range(vocab_size)
    blocks = np.full(-(-length // size), OWN + index, dtype=np.uint64)
    shared = request.block_hashes[: len(blocks)]
    blocks[: len(shared)] = np.array(shared, dtype=np.uint64)
    positions = np.arange(length, dtype=np.uint64)
    keys = _mixed(np.repeat(blocks, size)[:length]) + positions  # position too: an own block differs from the next
    keys = _mixed(keys + np.uint64((variant + 1) * 0x2545F491))
    ids: list[int] = (keys % np.uint64(high - low) + np.uint64(low)).astype(np.int64).tolist()
    return ids


def rotated(token_ids: Sequence[int], vocab_size: int, variant: int) -> list[int]:
    """Each id moved by the same step within the vocabulary: prefixes stay shared among what moved together."""
    if not variant:
        return list(token_ids)
    step = variant * 7919
    return [(token + step) % vocab_size for token in token_ids]


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
