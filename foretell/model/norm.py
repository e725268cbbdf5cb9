"""The two normalisations, as callables that own their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from foretell.config import Norm as NormKind
from foretell.kernels.base import Kernels
from foretell.model.residual import Pending, PendingNorm, PendingSum, Residual, total

Norm = Callable[[Residual | Pending], Tensor]  # [..., C] → [..., C]
PostNorm = Callable[[Tensor | Pending], Tensor | Pending]


@dataclass(slots=True)
class RMSNorm:
    kernels: Kernels
    weight: Tensor  # [C] float32
    eps: float

    def __call__(self, x: Residual | Pending) -> Tensor:
        if isinstance(x, PendingSum):
            return x.rms_normed(self.weight, self.eps)
        return self.kernels.rms_norm(total(x), self.weight, self.eps)


@dataclass(slots=True)
class DeferredRMSNorm:
    """Norms what a half of a block gave, as part of the sum and the norm that follow."""

    kernels: Kernels
    weight: Tensor  # [C] float32
    eps: float

    def __call__(self, y: Tensor | Pending) -> PendingNorm:
        return PendingNorm(self.kernels, total(y), self.weight, self.eps)


@dataclass(slots=True)
class LayerNorm:
    kernels: Kernels
    weight: Tensor  # [C] float32
    bias: Tensor | None
    eps: float

    def __call__(self, x: Residual | Pending) -> Tensor:
        return self.kernels.layer_norm(total(x), self.weight, self.bias, self.eps)


def make_norm(kernels: Kernels, kind: NormKind, weight: Tensor, bias: Tensor | None, eps: float) -> Norm:
    return RMSNorm(kernels, weight, eps) if kind == "rms" else LayerNorm(kernels, weight, bias, eps)
