"""What the linear layers of the CPU backend have in common: a packed weight, and a call with plain addresses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class PackedLinear:
    """y = x · Wᵀ + b for a weight [N, K] that ``packed`` holds in a kernel's own layout; ``kernel`` takes the
    addresses and, at its end, ``how`` it is packed."""

    __slots__ = ("_bias", "_bias_ptr", "_how", "_kernel", "_packed", "_packed_ptr", "in_features", "out_features")

    def __init__(
        self,
        shape: tuple[int, int],
        packed: Tensor,
        bias: Tensor | None,
        kernel: Callable[..., None],
        how: tuple[int, ...],
    ) -> None:
        self.out_features, self.in_features = shape
        self._packed, self._packed_ptr = packed, packed.data_ptr()
        self._bias = None if bias is None else bias.detach().float().clone()
        self._bias_ptr = None if self._bias is None else self._bias.data_ptr()
        self._kernel, self._how = kernel, how

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            return self(x.float()).to(x.dtype)
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, N, K = x.shape[0], self.out_features, self.in_features
        assert x.shape[1] == K
        y = torch.empty(rows, N)
        self._kernel(
            x.data_ptr(), x.stride(0), rows, N, K, self._packed_ptr, self._bias_ptr, y.data_ptr(), *self._how
        )
        return y
