"""The residual stream where a sum and the norm behind it are one kernel: the sum waits for the norm.

A block adds to x and norms the result. On a device where each pass over [M, h] costs a launch and its bytes,
``x + y`` is only noted, and the next norm does both at once; where y itself is still to be computed (normed by
itself, or added up over several ranks), that too. Elsewhere the stream is the plain tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from foretell.kernels.base import Kernels


class Pending(Protocol):
    """A tensor [M, h] that is not yet computed, because the sum and the norm behind it may do it in passing."""

    def value(self) -> Tensor: ...

    def added_and_normed(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + value), x + value)."""
        ...

    def __mul__(self, factor: float) -> Tensor: ...

    def __radd__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PendingNorm:
    """rms_norm(y), not yet computed; [M, h]."""

    kernels: Kernels
    y: Tensor
    weight: Tensor
    eps: float

    def value(self) -> Tensor:
        return self.kernels.rms_norm(self.y, self.weight, self.eps)

    def added_and_normed(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if eps == self.eps:
            return self.kernels.add_rms_norm(x, self.y, weight, eps, self.weight)
        return self.kernels.add_rms_norm(x, self.value(), weight, eps)

    def __mul__(self, factor: float) -> Tensor:
        return self.value() * factor

    def __radd__(self, x: Tensor) -> Tensor:
        return x + self.value()


class PendingSum:
    """x, or x + y not yet added up; [M, h]."""

    __slots__ = ("_kernels", "_x", "_y")

    def __init__(self, kernels: Kernels, x: Tensor, y: Tensor | Pending | None = None) -> None:
        self._kernels, self._x, self._y = kernels, x, y

    def __add__(self, y: Tensor | Pending) -> PendingSum:
        return PendingSum(self._kernels, self.total(), y)

    def total(self) -> Tensor:
        """The sum as a tensor, added up now if it was not."""
        if self._y is not None:
            self._x, self._y = self._x + total(self._y), None
        return self._x

    def rms_normed(self, weight: Tensor, eps: float) -> Tensor:
        """The norm of the sum; the sum stays behind."""
        y = self._y
        if y is None:
            return self._kernels.rms_norm(self._x, weight, eps)
        if isinstance(y, Tensor):
            normed, self._x = self._kernels.add_rms_norm(self._x, y, weight, eps)
        else:
            normed, self._x = y.added_and_normed(self._x, weight, eps)
        self._y = None
        return normed

    def chosen(self, rows: Tensor) -> PendingSum:
        """Some rows of it, [R, h]."""
        return PendingSum(self._kernels, self.total().index_select(0, rows))


Residual = Tensor | PendingSum


class Adds(Protocol):
    """A linear layer that ends a half of a block: what it gives is added to the stream."""

    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor | Pending:
        """x [M, K] → [M, h]."""
        ...


def total(x: Residual | Pending) -> Tensor:
    """The tensor, computed now if it was not."""
    if isinstance(x, Tensor):
        return x
    return x.total() if isinstance(x, PendingSum) else x.value()


def chosen(x: Residual, rows: Tensor | None) -> Residual:
    """x [M, h] → its ``rows`` [R, h]; None: all of them."""
    if rows is None:
        return x
    return x.chosen(rows) if isinstance(x, PendingSum) else x.index_select(0, rows)
