"""A linear layer whose weights stay as a GGUF file ships them: 4 to 8 bits instead of 16 to read at every step."""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from typing import Final

import torch
from torch import Tensor

# Type: (number of cpu_quant.h, weights in a block, bytes of a block)
TYPES: Final[dict[str, tuple[int, int, int]]] = {
    "Q4_0": (0, 32, 18),
    "Q4_1": (1, 32, 20),
    "Q5_0": (2, 32, 22),
    "Q5_1": (3, 32, 24),
    "Q8_0": (4, 32, 34),
    "Q4_K": (5, 256, 144),
    "Q6_K": (6, 256, 210),
}
_P, _L, _I = c_void_p, c_int64, c_int
SIGNATURES: Final[dict[str, tuple[type, ...]]] = {
    "ft_quant_bytes": (_L, _L, _I),
    "ft_pack_quant": (_P, _L, _L, _L, _I, _P),
    "ft_linear_quant": (_P, _L, _L, _L, _L, _P, _P, _P, _I),
}


def is_packable(raw: Tensor, quant_type: str) -> bool:
    return quant_type in TYPES and raw.device.type == "cpu" and raw.numel() > 0


class CpuQuantLinear:
    """Blocks [N, bytes per row] repacked in panels of 32 columns; the numbers in them are not touched.

    A result is bit by bit that of ``CpuLinear`` on the dequantised float32 weight, whatever the batch.
    """

    __slots__ = ("_bias", "_bias_ptr", "_call", "_packed", "_packed_ptr", "_type", "in_features", "out_features")

    def __init__(self, lib: CDLL, raw: Tensor, quant_type: str, bias: Tensor | None) -> None:
        self._type, weights, block_bytes = TYPES[quant_type]
        assert raw.dtype is torch.uint8
        assert raw.shape[1] % block_bytes == 0
        raw = raw.detach().contiguous()
        self.out_features, self.in_features = raw.shape[0], raw.shape[1] // block_bytes * weights
        size = lib.ft_quant_bytes(self.out_features, self.in_features, self._type)
        self._packed = torch.empty(size, dtype=torch.uint8)
        self._packed_ptr = self._packed.data_ptr()
        lib.ft_pack_quant(
            raw.data_ptr(), self.out_features, self.in_features, raw.shape[1], self._type, self._packed_ptr
        )
        self._bias = None if bias is None else bias.detach().float().clone()
        self._bias_ptr = None if self._bias is None else self._bias.data_ptr()
        self._call = lib.ft_linear_quant

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
        self._call(
            x.data_ptr(), x.stride(0), rows, N, K,
            self._packed_ptr, self._bias_ptr, y.data_ptr(), self._type,
        )  # fmt: skip
        return y
