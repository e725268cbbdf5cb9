"""Attention: queries, keys and values from the tokens; keys and values kept; values mixed by the queries.

MHA, GQA and MQA are this one class: only the number of key/value heads differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.kernels.base import BatchContext, HeadNorms, Kernels, KVLayer, Linear
from foretell.model.norm import Norm
from foretell.model.residual import Adds, Pending
from foretell.model.rope import Rotation


@dataclass(slots=True)
class Attention:
    """H query heads and G key/value heads of D dims; M tokens of all sequences lie end to end."""

    kernels: Kernels
    qkv: Linear  # [(H + 2G)·D, h]: the rows of W_q, then W_k, then W_v
    o: Adds  # [h, H·D]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    head_norms: HeadNorms | None = None  # each query and key head is normed by itself
    q_norm: Norm | None = None  # the whole projection is, all heads together
    k_norm: Norm | None = None

    def __call__(self, x: Tensor, rotation: Rotation | None, context: BatchContext, kv: KVLayer) -> Tensor | Pending:
        """x [M, h] → [M, h]; the tokens' keys and values stay behind in the cache, the queries do not."""
        q, k, v = self.project(x)
        mixed = self.kernels.attend(q, k, v, self.head_norms, rotation, kv, context, self.scale, self.window)
        return self.o(mixed)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [M, h] → q [M, H, D], k [M, G, D], v [M, G, D]: views of one product, x · [W_q W_k W_v]ᵀ."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return _normed(q, self.q_norm), _normed(k, self.k_norm), v


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x.flatten(1)).view_as(x)
