"""Embeddings: the final hidden states of a prompt, pooled to one vector of length 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foretell.core.messages import Chunk
    from foretell.worker.state import RequestState


def pool_chunk(state: RequestState, chunk: Chunk, hidden: Tensor) -> None:
    """Take in one chunk of a prompt; hidden [chunk.length, h] after the final norm. Summed in float64, so that how
    the prompt is cut into chunks does not show."""
    if state.params.pooling == "mean":
        part = hidden.double().sum(0).cpu()
        state.pooled = part if state.pooled is None else state.pooled + part
    elif chunk.sample:
        state.pooled = hidden[-1].double().cpu()


def embedding_of(state: RequestState) -> list[float]:
    """The vector [h] of a prompt that has been taken in whole. Its direction is that of the mean, or of the last
    token's state; zeros stay zeros."""
    if state.pooled is None:
        raise RuntimeError("no chunk of this prompt was pooled")
    return torch.nn.functional.normalize(state.pooled, dim=0).float().tolist()
