"""Attention of one new token per sequence where every query head has keys of its own (MHA): what ``triton_decode``
does for the others. A matrix unit would work for one row of sixteen. Here every slot of a tile is a softmax of its
own until the end: no thread waits for another while keys are read, and small programs keep many reads under way.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import let_next_start, wait_for_inputs
from foretell.kernels.triton_decode import MOST_SPLITS, _partner, _placed

LOWEST = tl.constexpr(-1e30)  # a maximum of nothing: finite, as -inf minus -inf is no number


@triton.jit(do_not_specialize=["window", "stride_t"])
def decode_lanes(
    qkv_ptr, stride_m, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    k_cache_ptr, v_cache_ptr, tables_ptr, stride_t, kv_lens_ptr,
    out_ptr, parts_ptr, arrived_ptr, scale, window, H,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SMALLEST: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (sequences · H, SPLITS ≤ MOST_SPLITS); the rest as in ``decode_attention``.

    parts: m and l [S·H, SPLITS, 2], then sums [S·H, SPLITS, BLOCK_D], float32.
    """
    let_next_start(PDL)
    pair, split, SPLITS = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    seq, head = (pair // H).to(tl.int64), pair % H
    d, n, one = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), tl.arange(0, 1)[:, None]
    # lengths, tables and the cache of earlier steps were complete before the projection began: see decode_attention
    length = tl.load(kv_lens_ptr + seq)
    old = length - 1  # keys in the cache; the last one is in qkv
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    span = old - first
    stretch = tl.maximum(tl.cdiv(tl.cdiv(span, SPLITS), BLOCK_N) * BLOCK_N, SMALLEST)
    splits = tl.maximum(tl.cdiv(span, stretch), 1)
    if split >= splits:
        return
    table = tables_ptr + seq * stride_t
    per_block = H * BLOCK_SIZE * D
    begin = first + split * stretch
    end = tl.minimum(begin + stretch, old)
    inside = d < D
    own_block = tl.load(table + tl.maximum(old, 0) // BLOCK_SIZE).to(tl.int64)  # of the new token
    key = begin + n
    block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
    soon_block = tl.load(table + (key + BLOCK_N) // BLOCK_SIZE, mask=key + BLOCK_N < end, other=0)
    places = block * per_block + (head * BLOCK_SIZE + key % BLOCK_SIZE) * D
    held = (key < end)[:, None] & inside[None, :]
    k = tl.load(k_cache_ptr + places[:, None] + d[None, :], mask=held, other=0.0)
    v = tl.load(v_cache_ptr + places[:, None] + d[None, :], mask=held, other=0.0)
    wait_for_inputs(PDL)
    row, partner = qkv_ptr + seq * stride_m + head * D, _partner(d, R)
    mine = inside[None, :] & (one == 0)
    q = tl.load(row + d[None, :] + one, mask=mine, other=0.0)
    q_other = tl.load(row + partner[None, :] + one, mask=mine, other=0.0)
    k_new = tl.load(row + H * D + d[None, :] + one, mask=mine, other=0.0)
    k_other = tl.load(row + H * D + partner[None, :] + one, mask=mine, other=0.0)
    v_new = tl.load(row + 2 * H * D + d, mask=inside, other=0.0).to(v_cache_ptr.dtype.element_ty)
    turned, pair_of = d < 2 * R, tl.where(d < R, d, d - R)
    cos = tl.load(cos_ptr + seq * R + pair_of, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + seq * R + pair_of, mask=turned, other=0.0)
    q = _placed(q, q_other, cos, sin, q_weight_ptr, eps, d, D, R, NORM).to(tl.float32) * (scale * 1.4426950408889634)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_N,), tl.float32)  # noqa: E741
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_N):
        scores = tl.where(at + n < end, tl.sum(k.to(tl.float32) * q, axis=1), float("-inf"))
        highest = tl.maximum(m, scores)
        p, keep = tl.exp2(scores - highest), tl.exp2(m - highest)
        m, l = highest, l * keep + p  # noqa: E741
        total = total * keep[:, None] + p[:, None] * v.to(tl.float32)
        key = at + BLOCK_N + n
        block = soon_block.to(tl.int64)
        soon_block = tl.load(table + (key + BLOCK_N) // BLOCK_SIZE, mask=key + BLOCK_N < end, other=0)
        places = block * per_block + (head * BLOCK_SIZE + key % BLOCK_SIZE) * D
        held = (key < end)[:, None] & inside[None, :]
        k = tl.load(k_cache_ptr + places[:, None] + d[None, :], mask=held, other=0.0)
        v = tl.load(v_cache_ptr + places[:, None] + d[None, :], mask=held, other=0.0)
    highest, own = tl.max(m, axis=0), LOWEST
    if split == 0:
        k_new = _placed(k_new, k_other, cos, sin, k_weight_ptr, eps, d, D, R, NORM).to(k_cache_ptr.dtype.element_ty)
        place = own_block * per_block + (head * BLOCK_SIZE + old % BLOCK_SIZE) * D
        if length > 0:
            tl.store(k_cache_ptr + place + d[None, :] + one, k_new, mask=mine)
            tl.store(v_cache_ptr + place + d, v_new, mask=inside)
        own = tl.sum(tl.sum(k_new.to(tl.float32) * q, axis=1), axis=0)
        highest = tl.maximum(highest, own)
    factor, weight = tl.exp2(m - highest), tl.exp2(own - highest)
    norm = tl.sum(l * factor, axis=0) + weight
    mixed = tl.sum(total * factor[:, None], axis=0) + weight * v_new.to(tl.float32)
    out_at = out_ptr + (seq * H + head) * D + d
    if splits == 1:
        tl.store(out_at, tl.where(length > 0, mixed / norm, 0.0).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        here, sums_ptr = pair.to(tl.int64) * SPLITS, parts_ptr + tl.num_programs(0).to(tl.int64) * SPLITS * 2
        tl.store(parts_ptr + (here + split) * 2, highest)
        tl.store(parts_ptr + (here + split) * 2 + 1, norm)
        tl.store(sums_ptr + (here + split) * BLOCK_D + d, mixed)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.debug_barrier()
            s = tl.arange(0, MOST_SPLITS)
            there, parts = s < splits, here + s
            ms = tl.load(parts_ptr + parts * 2, mask=there, other=LOWEST, cache_modifier=".cg")
            ls = tl.load(parts_ptr + parts * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            sums_at = sums_ptr + parts[:, None] * BLOCK_D + d[None, :]
            sums = tl.load(sums_at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            share = tl.exp2(ms - tl.max(ms, axis=0))
            mixed = tl.sum(sums * share[:, None], axis=0) / tl.sum(ls * share, axis=0)
            tl.store(out_at, mixed.to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(arrived_ptr + pair, 0)
