"""The residual stream where a sum and the norm behind it are one kernel: the sum waits for the norm.

A block adds to x and norms the result. On a device where each pass over [M, h] costs a launch and its bytes,
``x + y`` is only noted, and the next norm does both at once. Elsewhere the stream is the plain tensor.
"""

from __future__ import annotations

from torch import Tensor

from foretell.kernels.base import Kernels


class PendingSum:
    """x, or x + y not yet added up; [M, h]."""

    __slots__ = ("_kernels", "_x", "_y")

    def __init__(self, kernels: Kernels, x: Tensor, y: Tensor | None = None) -> None:
        self._kernels, self._x, self._y = kernels, x, y

    def __add__(self, y: Tensor) -> PendingSum:
        return PendingSum(self._kernels, self.total(), y)

    def total(self) -> Tensor:
        """The sum as a tensor, added up now if it was not."""
        if self._y is not None:
            self._x, self._y = self._x + self._y, None
        return self._x

    def rms_normed(self, weight: Tensor, eps: float) -> Tensor:
        """The norm of the sum; the sum stays behind."""
        if self._y is None:
            return self._kernels.rms_norm(self._x, weight, eps)
        normed, self._x = self._kernels.add_rms_norm(self._x, self._y, weight, eps)
        self._y = None
        return normed


Residual = Tensor | PendingSum


def total(x: Residual) -> Tensor:
    return x.total() if isinstance(x, PendingSum) else x
