"""Attention of one new token per sequence, with all that comes before it: norm, rotation, keeping K and V.

Bound by reading the cache. The query heads of one KV head share its keys, so they are the rows of one tile. Keys are
split over SPLITS programs (Dao et al. 2023, "Flash-Decoding"); each program derives its stretch from the sequence's
length on the device, so one captured graph serves all lengths. The last to arrive merges the parts in order.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import let_next_start, prefetch, wait_for_inputs


@triton.jit
def _head_rows(
    ptr, heads, inside, cos, sin, weight_ptr, eps,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads [len(heads), BLOCK_D] from ptr + head · D, normed and rotated, rounded to the activations' dtype after
    each step as separate kernels would."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    at = heads[:, None] * D
    kind = ptr.dtype.element_ty
    x = tl.load(ptr + at + d[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
    if NORM:
        x = (x * scale * tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]).to(kind).to(tl.float32)
    if R > 0:
        turned = d < 2 * R
        partner = tl.where(d < R, d + R, tl.where(turned, d - R, d))
        other = tl.load(ptr + at + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            weight = tl.load(weight_ptr + partner, mask=d < D, other=0.0)[None, :]
            other = (other * scale * weight).to(kind).to(tl.float32)
        pair = tl.where(d < R, d, d - R)
        c = tl.load(cos + pair, mask=turned, other=1.0)[None, :]
        s = tl.load(sin + pair, mask=turned, other=0.0)[None, :]
        x = x * c + other * tl.where((d < R)[None, :], -s, s)
    return x.to(kind)


@triton.jit
def decode_attention(
    qkv_ptr, stride_m, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    k_cache_ptr, v_cache_ptr, tables_ptr, stride_t, kv_lens_ptr,
    out_ptr, parts_ptr, arrived_ptr, scale, window, H, G,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    SMALLEST: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
    LINES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (sequences · G, SPLITS). qkv [S, (H + 2G)·D] → out [S, H·D]; the new token's k and v go to the cache.
    SHARE = H / G query heads. LINES: 128-byte lines of a head, AHEAD: tiles of keys asked for early. A sequence of
    length 0 is padding: zeros, nothing is kept.

    parts: m and l [S·G, SPLITS, BLOCK_H], then sums [S·G, SPLITS, BLOCK_H, BLOCK_D], float32.
    """
    let_next_start(PDL)
    pair, split = tl.program_id(0), tl.program_id(1)
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
    wait_for_inputs(PDL)
    heads_inside = h < SHARE
    out_at = out_ptr + seq * H * D + (group * SHARE + h)[:, None] * D + d[None, :]
    out_mask = heads_inside[:, None] & (d < D)[None, :]
    if length <= 0:
        if split == 0:
            tl.store(out_at, tl.zeros((BLOCK_H, BLOCK_D), out_ptr.dtype.element_ty), mask=out_mask)
    else:
        row = qkv_ptr + seq * stride_m
        cos, sin = cos_ptr + seq * R, sin_ptr + seq * R
        q = _head_rows(row, group * SHARE + h, heads_inside, cos, sin, q_weight_ptr, eps, D, R, BLOCK_D, NORM)
        m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_H,), tl.float32)  # noqa: E741
        total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        if split == 0:
            one = tl.arange(0, 1)
            own = one < 1
            k_new = _head_rows(row + H * D, group + one, own, cos, sin, k_weight_ptr, eps, D, R, BLOCK_D, NORM)
            v_new = tl.load(row + (H + G + group) * D + d, mask=d < D, other=0.0)[None, :]
            k_new, v_new = k_new.to(k_cache_ptr.dtype.element_ty), v_new.to(v_cache_ptr.dtype.element_ty)
            block = tl.load(table + old // BLOCK_SIZE).to(tl.int64)
            place = block * per_block + (group * BLOCK_SIZE + old % BLOCK_SIZE) * D + d[None, :]
            tl.store(k_cache_ptr + place, k_new, mask=(d < D)[None, :])
            tl.store(v_cache_ptr + place, v_new, mask=(d < D)[None, :])
            m = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * (scale * 1.4426950408889634)
            l += 1.0  # noqa: E741
            total += v_new.to(tl.float32)
        for at in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            key = at + n
            seen = key < end
            block = tl.load(table + key // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
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
                _merge(
                    parts_ptr, sums_ptr, pair, splits, out_at, out_mask, h, d,
                    BLOCK_H, BLOCK_D, SPLITS, BLOCK_S,
                )  # fmt: skip
                tl.store(arrived_ptr + pair, 0)


@triton.jit
def decode_attention_in_lanes(
    qkv_ptr, stride_m, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    k_cache_ptr, v_cache_ptr, tables_ptr, stride_t, kv_lens_ptr,
    out_ptr, parts_ptr, arrived_ptr, scale, window, H, G,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
    SMALLEST: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As ``decode_attention``, for a few sequences, where time goes by waiting and not by reading: no matrix unit and
    no exchange between threads until the end. Each of BLOCK_N lanes of threads keeps a softmax of its own over
    every BLOCK_N-th key, and the first keys are read before the inputs are there."""
    let_next_start(PDL)
    pair, split = tl.program_id(0), tl.program_id(1)
    seq, group = (pair // G).to(tl.int64), pair % G
    h, d, n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    length = tl.load(kv_lens_ptr + seq)
    old = length - 1
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
    begin = start + split * stretch
    end = tl.minimum(begin + stretch, old)
    seen = (begin + n < end) & (begin + n >= first)
    places = _places(table, begin + n, seen, group, G, BLOCK_SIZE, D)[None, :, None] + d[None, None, :]
    mask = seen[None, :, None] & (d < D)[None, None, :]
    k = tl.load(k_cache_ptr + places, mask=mask, other=0.0)
    v = tl.load(v_cache_ptr + places, mask=mask, other=0.0)
    wait_for_inputs(PDL)
    own_heads = h < SHARE
    out_at = out_ptr + seq * H * D + (group * SHARE + h)[:, None] * D + d[None, :]
    out_mask = own_heads[:, None] & (d < D)[None, :]
    row = qkv_ptr + seq * stride_m
    cos, sin = cos_ptr + seq * R, sin_ptr + seq * R
    q = _head_rows(row, group * SHARE + h, own_heads, cos, sin, q_weight_ptr, eps, D, R, BLOCK_D, NORM)
    q = q.to(tl.float32) * (scale * 1.4426950408889634)
    each = q[:, None, :]
    m = tl.full((BLOCK_H, BLOCK_N), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)  # noqa: E741
    total = tl.zeros((BLOCK_H, BLOCK_N, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_N):
        key = at + BLOCK_N + n
        seen_next = key < end
        places = _places(table, key, seen_next, group, G, BLOCK_SIZE, D)[None, :, None] + d[None, None, :]
        mask = seen_next[None, :, None] & (d < D)[None, None, :]
        k_next = tl.load(k_cache_ptr + places, mask=mask, other=0.0)
        v_next = tl.load(v_cache_ptr + places, mask=mask, other=0.0)
        scores = tl.sum(each * k.to(tl.float32), axis=2)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest = tl.maximum(m, scores)
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        p, keep = tl.exp2(scores - safe), tl.exp2(m - safe)
        l = l * keep + p  # noqa: E741
        total = total * keep[:, :, None] + p[:, :, None] * v.to(tl.float32)
        m, k, v, seen = highest, k_next, v_next, seen_next
    highest = tl.max(m, axis=1)
    new = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    v_new = tl.zeros((1, BLOCK_D), tl.float32)
    if split == 0 and length > 0:
        one = tl.arange(0, 1)
        only = one < 1
        k_row = _head_rows(row + H * D, group + one, only, cos, sin, k_weight_ptr, eps, D, R, BLOCK_D, NORM)
        v_row = tl.load(row + (H + G + group) * D + d, mask=d < D, other=0.0)[None, :]
        k_row, v_row = k_row.to(k_cache_ptr.dtype.element_ty), v_row.to(v_cache_ptr.dtype.element_ty)
        last = old + one
        place = _places(table, last, only, group, G, BLOCK_SIZE, D)[:, None] + d[None, :]
        tl.store(k_cache_ptr + place, k_row, mask=(d < D)[None, :])
        tl.store(v_cache_ptr + place, v_row, mask=(d < D)[None, :])
        new = tl.sum(q * k_row.to(tl.float32), axis=1)
        v_new = v_row.to(tl.float32)
    highest = tl.maximum(highest, new)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(m - safe[:, None])
    share = tl.exp2(new - safe)
    sums = tl.sum(l * weights, axis=1) + share
    mixed = tl.sum(total * weights[:, :, None], axis=1) + share[:, None] * v_new
    if splits == 1:
        result = tl.where(length > 0, mixed / sums[:, None], 0.0)
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        here = pair.to(tl.int64) * SPLITS + split
        sums_ptr = parts_ptr + tl.num_programs(0).to(tl.int64) * SPLITS * 2 * BLOCK_H
        tl.store(parts_ptr + here * 2 * BLOCK_H + h, highest)
        tl.store(parts_ptr + here * 2 * BLOCK_H + BLOCK_H + h, sums)
        tl.store(sums_ptr + (here * BLOCK_H + h[:, None]) * BLOCK_D + d[None, :], mixed, mask=own_heads[:, None])
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
            tl.debug_barrier()
            _merge(parts_ptr, sums_ptr, pair, splits, out_at, out_mask, h, d, BLOCK_H, BLOCK_D, SPLITS, BLOCK_S)
            tl.store(arrived_ptr + pair, 0)


@triton.jit
def _places(table, key, seen, group, G, BLOCK_SIZE: tl.constexpr, D: tl.constexpr):
    """Offsets of keys' heads in the cache; where not ``seen``, somewhere inside it."""
    block = tl.load(table + key // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    block = tl.where(seen, block, 0)
    return block * (G * BLOCK_SIZE * D) + (group * BLOCK_SIZE + key % BLOCK_SIZE) * D


@triton.jit
def _merge(
    parts_ptr, sums_ptr, pair, splits, out_at, out_mask, h, d,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of the parts of one (sequence, KV head)."""
    s = tl.arange(0, BLOCK_S)
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
