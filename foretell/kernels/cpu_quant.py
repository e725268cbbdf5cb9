"""A linear layer whose weights stay as a GGUF file ships them: 4 to 8 bits instead of 16 to read at every step."""

from __future__ import annotations

from ctypes import CDLL, c_int, c_int64, c_void_p
from typing import Final

import torch
from torch import Tensor

from foretell.kernels.cpu_packed import PackedLinear

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


class CpuQuantLinear(PackedLinear):
    """Blocks [N, bytes per row] repacked in panels of 32 columns; the numbers in them are not touched.

    A result is bit by bit that of ``CpuLinear`` on the dequantised float32 weight, whatever the batch.
    """

    __slots__ = ()

    def __init__(self, lib: CDLL, raw: Tensor, quant_type: str, bias: Tensor | None) -> None:
        number, weights, block_bytes = TYPES[quant_type]
        assert raw.dtype is torch.uint8
        assert raw.shape[1] % block_bytes == 0
        raw = raw.detach().contiguous()
        N, K = raw.shape[0], raw.shape[1] // block_bytes * weights
        packed = torch.empty(lib.ft_quant_bytes(N, K, number), dtype=torch.uint8)
        lib.ft_pack_quant(raw.data_ptr(), N, K, raw.shape[1], number, packed.data_ptr())
        super().__init__((N, K), packed, bias, lib.ft_linear_quant, (number,))
