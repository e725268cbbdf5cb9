"""Attention of one new token per sequence, with all that comes before it: norm, rotation, keeping K and V.

Bound by reading the cache. The query heads of one KV head share its keys, so they are the rows of one tile. Keys are
split over programs (Dao et al. 2023, "Flash-Decoding"); each program derives its stretch from the sequence's
length on the device, so one captured graph serves all lengths. The last to arrive merges the parts in order.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import let_next_start, prefetch, wait_for_inputs

MOST_SPLITS = tl.constexpr(32)


@triton.jit
def _partner(d, R: tl.constexpr):
    """The dim that dim d turns with; itself beyond the rotated ones."""
    return tl.where(d < R, d + R, tl.where(d < 2 * R, d - R, d))


@triton.jit
def _placed(x, other, cos, sin, weight_ptr, eps, d, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr):
    """Heads x [n, BLOCK_D] with every dim's partner, normed and rotated, rounded to their dtype after each step as
    separate kernels would; cos and sin [BLOCK_D]."""
    kind = x.dtype
    x, other = x.to(tl.float32), other.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]
        partner = tl.load(weight_ptr + _partner(d, R), mask=d < D, other=0.0)[None, :]
        x = (x * scale * weight).to(kind).to(tl.float32)
        other = (other * scale * partner).to(kind).to(tl.float32)
    if R > 0:
        x = x * cos[None, :] + other * tl.where(d < R, -sin, sin)[None, :]
    return x.to(kind)


@triton.jit(do_not_specialize=["window", "stride_t"])
def decode_attention(
    qkv_ptr, stride_m, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    k_cache_ptr, v_cache_ptr, tables_ptr, stride_t, kv_lens_ptr,
    out_ptr, parts_ptr, arrived_ptr, scale, window, H, G,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    SMALLEST: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
    LINES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (sequences · G, SPLITS ≤ MOST_SPLITS). qkv [S, (H + 2G)·D] → out [S, H·D]; the new token's k and v go to
    the cache. SHARE = H / G query heads. LINES: 128-byte lines of a head, AHEAD: tiles of keys asked for early. A
    sequence of length 0 is padding: zeros, nothing is kept.

    parts: m and l [S·G, SPLITS, BLOCK_H], then sums [S·G, SPLITS, BLOCK_H, BLOCK_D], float32.
    """
    let_next_start(PDL)
    pair, split, SPLITS = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    seq, group = (pair // G).to(tl.int64), pair % G
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    # The step's lengths and tables, and the cache of earlier steps, were complete before the projection began (it
    # lets this kernel start only then): they are read, and the first keys asked for, while it still runs.
    length = tl.load(kv_lens_ptr + seq)
    old = length - 1  # keys in the cache; the last one is in qkv
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    start = first // BLOCK_N * BLOCK_N
    span = old - start
    stretch = tl.maximum(tl.cdiv(tl.cdiv(span, SPLITS), BLOCK_N) * BLOCK_N, SMALLEST)
    splits = tl.maximum(tl.cdiv(span, stretch), 1)
    if split >= splits:
        return
    table = tables_ptr + seq * stride_t
    per_block = G * BLOCK_SIZE * D
    begin = start + split * stretch
    end = tl.minimum(begin + stretch, old)
    n = tl.arange(0, BLOCK_N)
    if PDL:
        line = tl.arange(0, LINES) * (D // LINES)
        for tile in tl.static_range(AHEAD):
            soon = begin + tile * BLOCK_N + n
            wanted = (soon >= first) & (soon < end)
            paged = tl.load(table + soon // BLOCK_SIZE, mask=wanted, other=0).to(tl.int64)
            lines_at = tl.where(wanted, paged * per_block + (group * BLOCK_SIZE + soon % BLOCK_SIZE) * D, 0)
            prefetch(k_cache_ptr + lines_at[:, None] + line[None, :], PDL)
            prefetch(v_cache_ptr + lines_at[:, None] + line[None, :], PDL)
    own_block = tl.load(table + tl.maximum(old, 0) // BLOCK_SIZE).to(tl.int64)  # of the new token
    wait_for_inputs(PDL)
    heads_inside = h < SHARE
    out_at = out_ptr + seq * H * D + (group * SHARE + h)[:, None] * D + d[None, :]
    out_mask = heads_inside[:, None] & (d < D)[None, :]
    if length <= 0:
        if split == 0:
            tl.store(out_at, tl.zeros((BLOCK_H, BLOCK_D), out_ptr.dtype.element_ty), mask=out_mask)
    else:
        # everything is asked for before anything is used: one trip to memory, not five
        row = qkv_ptr + seq * stride_m
        inside, partner = d < D, _partner(d, R)
        q_row = row + (group * SHARE + h)[:, None] * D
        q = tl.load(q_row + d[None, :], mask=out_mask, other=0.0)
        q_other = tl.load(q_row + partner[None, :], mask=out_mask, other=0.0)
        one = tl.arange(0, 1)[:, None]
        is_first = inside[None, :] & (split + one == 0)
        k_row = row + (H + group + one) * D
        k_new = tl.load(k_row + d[None, :], mask=is_first, other=0.0)
        k_other = tl.load(k_row + partner[None, :], mask=is_first, other=0.0)
        v_new = tl.load(k_row + G * D + d[None, :], mask=is_first, other=0.0)
        turned = d < 2 * R
        pair_of = tl.where(d < R, d, d - R)
        cos = tl.load(cos_ptr + seq * R + pair_of, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + seq * R + pair_of, mask=turned, other=0.0)
        q = _placed(q, q_other, cos, sin, q_weight_ptr, eps, d, D, R, NORM)
        m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_H,), tl.float32)  # noqa: E741
        total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        if split == 0:
            k_new = _placed(k_new, k_other, cos, sin, k_weight_ptr, eps, d, D, R, NORM)
            k_kept, v_kept = k_new.to(k_cache_ptr.dtype.element_ty), v_new.to(v_cache_ptr.dtype.element_ty)
            place = own_block * per_block + (group * BLOCK_SIZE + old % BLOCK_SIZE) * D + d[None, :]
            tl.store(k_cache_ptr + place, k_kept, mask=inside[None, :])
            tl.store(v_cache_ptr + place, v_kept, mask=inside[None, :])
            m = tl.sum(q.to(tl.float32) * k_kept.to(tl.float32), axis=1) * (scale * 1.4426950408889634)
            l += 1.0  # noqa: E741
            total += v_kept.to(tl.float32)
        # a tile's place in the cache is looked up while the tile before it is worked on
        soon_block = tl.load(table + (begin + n) // BLOCK_SIZE, mask=begin + n < end, other=0)
        for at in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            key = at + n
            seen = key < end
            block, soon = soon_block.to(tl.int64), key + BLOCK_N
            soon_block = tl.load(table + soon // BLOCK_SIZE, mask=soon < end, other=0)
            if WINDOW:
                seen = seen & (key >= first)
                block = tl.where(seen, block, 0)
            places = block * per_block + (group * BLOCK_SIZE + key % BLOCK_SIZE) * D
            k = tl.load(k_cache_ptr + places[None, :] + d[:, None], mask=seen[None, :] & (d < D)[:, None], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision=EXACT) * (scale * 1.4426950408889634)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            highest = tl.maximum(m, tl.max(scores, axis=1))
            # a window can hide all of a first tile: -inf minus -inf would be NaN
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(scores - safe[:, None])
            keep = tl.exp2(m - safe)
            v = tl.load(v_cache_ptr + places[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            l = l * keep + tl.sum(p, axis=1)  # noqa: E741
            total = tl.dot(p.to(q.dtype), v.to(q.dtype), total * keep[:, None], input_precision=EXACT)
            m = highest
        if splits == 1:
            tl.store(out_at, (total / l[:, None]).to(out_ptr.dtype.element_ty), mask=out_mask)
        else:
            pairs = tl.num_programs(0)
            here = pair.to(tl.int64) * SPLITS + split
            sums_ptr = parts_ptr + pairs.to(tl.int64) * SPLITS * 2 * BLOCK_H
            tl.store(parts_ptr + here * 2 * BLOCK_H + h, m)
            tl.store(parts_ptr + here * 2 * BLOCK_H + BLOCK_H + h, l)
            sums_at = sums_ptr + (here * BLOCK_H + h[:, None]) * BLOCK_D + d[None, :]
            tl.store(sums_at, total, mask=heads_inside[:, None])
            tl.debug_barrier()
            if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
                tl.debug_barrier()
                _merge(parts_ptr, sums_ptr, pair, SPLITS, splits, out_at, out_mask, h, d, BLOCK_H, BLOCK_D)
                tl.store(arrived_ptr + pair, 0)


@triton.jit
def _merge(
    parts_ptr, sums_ptr, pair, SPLITS, splits, out_at, out_mask, h, d,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of the parts of one (sequence, KV head)."""
    s = tl.arange(0, MOST_SPLITS)
    here = pair.to(tl.int64) * SPLITS
    at = parts_ptr + (here + s[:, None]) * 2 * BLOCK_H + h[None, :]
    ms = tl.load(at, mask=(s < splits)[:, None], other=float("-inf"), cache_modifier=".cg")
    ls = tl.load(at + BLOCK_H, mask=(s < splits)[:, None], other=0.0, cache_modifier=".cg")
    highest = tl.max(ms, axis=0)
    norm = tl.sum(ls * tl.exp2(ms - highest[None, :]), axis=0)
    mixed = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for four in range(0, splits, 4):
        for i in tl.static_range(4):  # loads of four parts are under way at once
            part = four + i
            m = tl.load(
                parts_ptr + (here + part) * 2 * BLOCK_H + h,
                mask=(h < BLOCK_H) & (part < splits), other=float("-inf"), cache_modifier=".cg",
            )  # fmt: skip
            sums = sums_ptr + ((here + part) * BLOCK_H + h[:, None]) * BLOCK_D + d[None, :]
            own = tl.load(sums, mask=out_mask & (part < splits), other=0.0, cache_modifier=".cg")
            mixed += own * (tl.exp2(m - highest) / norm)[:, None]
    tl.store(out_at, mixed, mask=out_mask)
