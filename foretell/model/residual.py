"""The residual stream where a sum and the norm behind it are one kernel: the sum waits for the norm.

A block adds to x and norms the result. On a device where each pass over [M, h] costs a launch and its bytes,
``x + y`` is only noted, and the next norm does both at once; where a family norms y before it adds it, that too.
Elsewhere the stream is the plain tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foretell.kernels.base import Kernels


@dataclass(frozen=True, slots=True)
class PendingNorm:
    """rms_norm(y), not yet computed; [M, h]."""

    kernels: Kernels
    y: Tensor
    weight: Tensor
    eps: float

    def normed(self) -> Tensor:
        return self.kernels.rms_norm(self.y, self.weight, self.eps)

    def __mul__(self, factor: float) -> Tensor:
        return self.normed() * factor

    def __radd__(self, x: Tensor) -> Tensor:
        return x + self.normed()


class PendingSum:
    """x, or x + y not yet added up; [M, h]."""

    __slots__ = ("_kernels", "_x", "_y")

    def __init__(self, kernels: Kernels, x: Tensor, y: Tensor | PendingNorm | None = None) -> None:
        self._kernels, self._x, self._y = kernels, x, y

    def __add__(self, y: Tensor | PendingNorm) -> PendingSum:
        return PendingSum(self._kernels, self.total(), y)

    def total(self) -> Tensor:
        """The sum as a tensor, added up now if it was not."""
        if self._y is not None:
            y = self._y.normed() if isinstance(self._y, PendingNorm) else self._y
            self._x, self._y = self._x + y, None
        return self._x

    def rms_normed(self, weight: Tensor, eps: float) -> Tensor:
        """The norm of the sum; the sum stays behind."""
        y = self._y
        if y is None:
            return self._kernels.rms_norm(self._x, weight, eps)
        if isinstance(y, PendingNorm) and y.eps == eps:
            normed, self._x = self._kernels.add_rms_norm(self._x, y.y, weight, eps, y.weight)
        else:
            y = y.normed() if isinstance(y, PendingNorm) else y
            normed, self._x = self._kernels.add_rms_norm(self._x, y, weight, eps)
        self._y = None
        return normed

    def chosen(self, rows: Tensor) -> PendingSum:
        """Some rows of it, [R, h]."""
        return PendingSum(self._kernels, self.total().index_select(0, rows))


Residual = Tensor | PendingSum


def total(x: Residual) -> Tensor:
    return x.total() if isinstance(x, PendingSum) else x


def chosen(x: Residual, rows: Tensor | None) -> Residual:
    """x [M, h] → its ``rows`` [R, h]; None: all of them."""
    if rows is None:
        return x
    return x.chosen(rows) if isinstance(x, PendingSum) else x.index_select(0, rows)
