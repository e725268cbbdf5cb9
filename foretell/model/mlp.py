"""The feed-forward half of a block. It sees each token alone: constant work wherever the token stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from foretell.config import Activation
from foretell.kernels.base import Kernels, Linear
from foretell.model.residual import Adds, Pending


class MLP(Protocol):
    """Anything that maps each token's [h] to [h]: gated, plain, or a mixture of experts."""

    def __call__(self, x: Tensor) -> Tensor | Pending:
        """x [M, h] → [M, h]."""
        ...


@dataclass(slots=True)
class GatedMLP:
    """W_down · (act(W_gate·x) ⊙ W_up·x) (Shazeer 2020, "GLU variants")."""

    kernels: Kernels
    gate_up: Linear  # [2·ffn, h]: the rows of W_gate, then W_up
    down: Adds  # [h, ffn]
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor | Pending:
        return self.down(self.kernels.gated_linear(self.gate_up, x, self.activation))


@dataclass(slots=True)
class PlainMLP:
    """W_down · act(W_up·x), as in the first transformers."""

    kernels: Kernels
    up: Linear  # [ffn, h]
    down: Adds  # [h, ffn]
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor | Pending:
        return self.down(self.kernels.activate(self.up(x), self.activation))
