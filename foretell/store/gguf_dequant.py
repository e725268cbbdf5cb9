"""GGUF blocks to floats, in torch, a cache-sized run of blocks at a time.

Formats: https://github.com/ggml-org/ggml (ggml-common.h). Every function maps ``blocks`` [n, bytes per block]
uint8 to ``out`` [n, weights per block] float32, in the same order of float operations as
``gguf.dequantize``, so results are equal bit by bit. Q2_K and Q3_K are left to the gguf package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_RUN_WEIGHTS: Final = 1 << 19  # 2 MiB of float32: stays in cache between the steps below


def dequantise(blocks: Tensor, quant_type: str, weights_per_block: int, dtype: torch.dtype) -> Tensor:
    """``blocks`` [n, bytes per block] uint8 → [n · weights_per_block] of ``dtype``, freshly allocated."""
    unpack = _UNPACK.get(quant_type)
    n = blocks.shape[0]
    out = torch.empty(n, weights_per_block, dtype=dtype)
    run = max(1, _RUN_WEIGHTS // weights_per_block)
    scratch = torch.empty(min(run, n), weights_per_block) if dtype != torch.float32 else None
    for start in range(0, n, run):
        part = blocks[start : start + run]
        target = out[start : start + run]
        if unpack is None:
            target.copy_(_with_gguf(part, quant_type))
        elif scratch is None:
            unpack(part, target)
        else:
            unpack(part, scratch[: part.shape[0]])
            target.copy_(scratch[: part.shape[0]])
    return out.view(-1)


def _with_gguf(blocks: Tensor, quant_type: str) -> Tensor:
    import gguf

    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[quant_type]))


def _half(blocks: Tensor, byte: int) -> Tensor:
    """The float16 at ``byte`` of each block, as [n, 1] float32."""
    return blocks[:, byte : byte + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """``packed`` [n, g, w] → ``out`` [n, g, 2, w]: low halves first, then high halves."""
    out[:, :, 0] = packed & 0x0F
    out[:, :, 1] = packed >> 4


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, None, 2:], out.view(-1, 1, 2, 16))
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, None, 4:], out.view(-1, 1, 2, 16))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _five_bits(low: Tensor, high: Tensor, out: Tensor) -> None:
    """16 bytes of low nibbles and 4 bytes of fifth bits per block → ``out`` [n, 32], 0 to 31."""
    bits = (high[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    bits = bits.reshape(-1, 32) << 4
    out[:, :16] = (low & 0x0F) | bits[:, :16]
    out[:, 16:] = (low >> 4) | bits[:, 16:]


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _five_bits(blocks[:, 6:], blocks[:, 2:6], out)
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _five_bits(blocks[:, 8:], blocks[:, 4:8], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 bytes of eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K → two [n, 8] float32."""
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], dim=1)
    minima = torch.cat([middle & 0x3F, (high >> 4) | ((middle >> 2) & 0x30)], dim=1)
    return scales.float(), minima.float()


def _scale_k(blocks: Tensor, out: Tensor) -> None:
    """out · (d · scale) - dmin · minimum, per group of 32, in place: the last step of Q4_K and Q5_K."""
    scales, minima = _k_scales(blocks[:, 4:16])
    groups = out.view(-1, 8, 32)
    groups.mul_((scales * _half(blocks, 0))[:, :, None]).sub_((minima * _half(blocks, 2))[:, :, None])


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 16:].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    _scale_k(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    high, low = blocks[:, 16:48], blocks[:, 48:].view(-1, 4, 32)
    groups = out.view(-1, 4, 2, 32)
    for pair in range(4):
        groups[:, pair, 0] = (low[:, pair] & 0x0F) | (((high >> (2 * pair)) & 1) << 4)
        groups[:, pair, 1] = (low[:, pair] >> 4) | (((high >> (2 * pair + 1)) & 1) << 4)
    _scale_k(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low, high = blocks[:, :128].view(-1, 2, 2, 32), blocks[:, 128:192].view(-1, 2, 32)
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    quarters = out.view(-1, 2, 4, 32)
    for quarter in range(4):  # low nibbles of 64 weights, then their high nibbles; two more bits from `high`
        nibble = low[:, :, quarter % 2] & 0x0F if quarter < 2 else low[:, :, quarter % 2] >> 4
        quarters[:, :, quarter] = nibble | (((high >> (2 * quarter)) & 3) << 4)
    out.sub_(32).view(-1, 16, 16).mul_(scales[:, :, None])


_UNPACK: Final[dict[str, Callable[[Tensor, Tensor], None]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
