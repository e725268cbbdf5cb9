"""Parallelism wraps the model: the parts that need the other ranks are replaced, the rest does not know of them.

Two sums a layer (Shoeybi et al. 2019, "Megatron-LM"): each half ends in a linear layer of which a rank has some
columns, and its products are added up over the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.kernels.base import Linear
from foretell.model.attention import Attention
from foretell.model.mlp import GatedMLP, PlainMLP
from foretell.model.norm import RMSNorm
from foretell.model.residual import Adds, Pending, Residual, total
from foretell.model.transformer import Embedding, Head, Transformer
from foretell.parallel.comm import Group


class SummedLinear:
    """A linear layer of which each rank has a share of the columns: [M, K/tp] → [M, N], summed."""

    def __init__(self, linear: Adds, group: Group) -> None:
        self.linear, self.group = linear, group
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, x: Tensor) -> Tensor | Pending:
        return self.group.summed(total(self.linear(x)))


class GatheredLinear:
    """The head, of which each rank has a share of the vocabulary: [R, h] → [R, vocab], padding cut off."""

    def __init__(self, linear: Linear, group: Group, vocab_size: int) -> None:
        self.linear, self.group = linear, group
        self.in_features, self.out_features = linear.in_features, vocab_size

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.gather(self.linear(x))[:, : self.out_features]

    def into(self, x: Tensor, out: Tensor) -> None:
        self.group.gather_into(self.linear(x), out)


class SharedEmbedding(Embedding):
    """Each rank looks up the tokens in its share of the vocabulary and has zeros for the others, then all add up."""

    __slots__ = ("group",)

    def __init__(self, own: Embedding, group: Group) -> None:
        Embedding.__init__(self, own.tokens, own.positions, own.multiplier, own.dtype)
        self.group = group

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        rows = self.tokens.shape[0]
        local = token_ids - self.group.shard * rows
        inside = (local >= 0) & (local < rows)
        x = self.tokens[torch.where(inside, local, 0)].to(self.dtype)
        x = self.group.sum_(torch.where(inside[:, None], x, 0.0))
        if self.multiplier != 1.0:
            x = x * self.multiplier
        return x if self.positions is None else x + self.positions[positions].to(self.dtype)


@dataclass(slots=True)
class SharedRMSNorm:
    """RMS norm over a dimension that is split over the ranks (OLMo 2 norms all heads together)."""

    own: RMSNorm
    group: Group

    def __call__(self, x: Residual | Pending) -> Tensor:
        x = total(x)
        wide = x.float()
        squares = self.group.sum_(wide.square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / (x.shape[-1] * self.group.size) + self.own.eps)
        return (wide * scale * self.own.weight.float()).to(x.dtype)


def wrap(model: Transformer, group: Group, vocab_size: int) -> Transformer:
    """The shard's model, made to work with the others of its group; ``vocab_size``: the whole one."""
    if group.size == 1:
        return model
    for block in model.blocks:
        share_attention(block.attention, group)
        mlp = block.mlp
        if not isinstance(mlp, (GatedMLP, PlainMLP)):
            raise TypeError(f"tensor parallelism does not know how to split {type(mlp).__name__}")
        mlp.down = SummedLinear(mlp.down, group)
    if model.embedding is not None:
        model.embedding = SharedEmbedding(model.embedding, group)
    if model.head is not None:
        model.head = Head(GatheredLinear(model.head.linear, group, vocab_size), model.head.divisor)
    return model


def share_attention(attention: Attention, group: Group) -> None:
    attention.o = SummedLinear(attention.o, group)
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        if isinstance(norm, RMSNorm):
            setattr(attention, name, SharedRMSNorm(norm, group))
