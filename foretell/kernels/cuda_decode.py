"""Attention of one new token per sequence on a GPU: which kernel, and how it is launched."""

from __future__ import annotations

from torch import Tensor

from foretell.kernels import cuda_tuning, triton_decode, triton_lanes
from foretell.kernels.base import BatchContext, HeadNorms, KVLayer
from foretell.kernels.cuda_linear import precision
from foretell.kernels.cuda_tuning import power_of_two
from foretell.kernels.triton_common import Scratch, launch, num_multiprocessors


def decode(
    qkv: Tensor,
    H: int,
    norms: HeadNorms | None,
    rotation: tuple[Tensor, Tensor] | None,
    kv: KVLayer,
    context: BatchContext,
    scale: float,
    window: int | None,
    out: Tensor,
    scratch: Scratch,
) -> None:
    """Rows qkv [S, (H + 2G)·D], one per sequence, → out [S, H·D]; their keys and values are kept."""
    S, (_, G, block_size, D), device = len(qkv), kv.k.shape, qkv.device
    tables = context.groups[kv.group].block_tables
    longest = tables.shape[1] * block_size if window is None else min(tables.shape[1] * block_size, window)
    cos, sin = rotation if rotation is not None else (qkv, qkv)
    R = cos.shape[1] if rotation is not None else 0
    share, block_d = H // G, power_of_two(D, 16)
    inputs = (
        qkv, qkv.stride(0), cos, sin, *norm_arguments(norms, qkv), kv.k, kv.v, tables, tables.stride(0),
        context.kv_lens, out,
    )  # fmt: skip
    parts = arrived = out
    if (
        share == 1
        and qkv.element_size() == 2
        and (lanes := cuda_tuning.lanes(S * G, block_d, num_multiprocessors(device)))
    ):
        if lanes.splits > 1:
            parts = scratch.floats(S * G * lanes.splits * (2 + block_d), device)
            arrived = scratch.counters(S * G, device)
        launch(
            triton_lanes.decode_lanes, (S * G, lanes.splits),
            *inputs, parts, arrived, scale, window or 0, H, block_size, D, R, block_d, lanes.block_n, lanes.smallest,
            norms is not None, window is not None, num_warps=lanes.num_warps, maxnreg=lanes.registers, device=device,
        )  # fmt: skip
        return
    how = cuda_tuning.decode(S * G, D, num_multiprocessors(device), longest)
    how = how.wide() if qkv.element_size() == 4 else how
    block_h = power_of_two(share, 16)
    if how.splits > 1:
        parts = scratch.floats(S * G * how.splits * block_h * (2 + block_d), device)
        arrived = scratch.counters(S * G, device)
    lines = power_of_two(max(D * kv.k.element_size() // 128, 1))
    launch(
        triton_decode.decode_attention, (S * G, how.splits),
        *inputs, parts, arrived, scale, window or 0, H, G, block_size, D, R, block_d, share, block_h,
        how.block_n, how.smallest, norms is not None, window is not None, precision(qkv), how.stages,
        lines, how.ahead, num_warps=how.num_warps, device=device,
    )  # fmt: skip


def norm_arguments(norms: HeadNorms | None, other: Tensor) -> tuple[Tensor, Tensor, float]:
    """A kernel's arguments for the norms of heads; where there are none, ``other`` stands in for what is not read."""
    return (other, other, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
