"""The transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foretell.kernels.base import BatchContext, KVLayer
from foretell.model.attention import Attention
from foretell.model.mlp import MLP
from foretell.model.norm import Norm, PostNorm
from foretell.model.residual import Pending, Residual, chosen, total
from foretell.model.rope import Rotation


def unchanged(x: Residual | Pending) -> Tensor:
    """The norm that a family does not have at this place."""
    return total(x)


def as_it_is(y: Tensor | Pending) -> Tensor | Pending:
    """The same, of what a half gives."""
    return y


@dataclass(slots=True)
class Block:
    """One layer. Pre-norm families norm what goes into each half, post-norm ones what comes out, sandwich both."""

    attention: Attention
    mlp: MLP
    attention_norm: Norm = unchanged
    mlp_norm: Norm = unchanged
    attention_post_norm: PostNorm = as_it_is
    mlp_post_norm: PostNorm = as_it_is
    residual_multiplier: float = 1.0
    parallel: bool = False  # both halves read the same x (GPT-J's form, used by GPT-NeoX and Falcon)

    def __call__(self, x: Residual, rotation: Rotation | None, context: BatchContext, kv: KVLayer) -> Residual:
        """x [M, h] → [M, h], or [S, h] where the context wants last rows alone."""
        attended = self.attention(self.attention_norm(x), rotation, context, kv)
        x = chosen(x, context.last_rows)
        if self.parallel:
            return x + attended + self.mlp(self.mlp_norm(x))
        x = x + self.scaled(self.attention_post_norm(attended))
        return x + self.scaled(self.mlp_post_norm(self.mlp(self.mlp_norm(x))))

    def scaled(self, x: Tensor | Pending) -> Tensor | Pending:
        return x if self.residual_multiplier == 1.0 else x * self.residual_multiplier


@dataclass(slots=True)
class SharedNormBlock:
    """Parallel block whose halves read one and the same normed x (Falcon 7B): the norm is computed once."""

    attention: Attention
    mlp: MLP
    norm: Norm

    def __call__(self, x: Residual, rotation: Rotation | None, context: BatchContext, kv: KVLayer) -> Residual:
        """x [M, h] → [M, h], or [S, h] where the context wants last rows alone."""
        normed = self.norm(x)
        attended = self.attention(normed, rotation, context, kv)
        return chosen(x, context.last_rows) + attended + self.mlp(total(chosen(normed, context.last_rows)))
