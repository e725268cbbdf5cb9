"""Attention of many new tokens per sequence: bound by the matrix unit (Dao 2023, "FlashAttention-2").

Two kernels with one inner step. ``paged_prefill`` reads keys and values from the cache, whatever came before this
chunk; ``fresh_prefill`` reads them where the projection left them, for chunks with nothing before them: whole tiles
then come through the copy engine, without address arithmetic.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import let_next_start, wait_for_inputs


@triton.jit
def _tile_of(starts_ptr, kv_lens_ptr, S, skip_from, wanted, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sequence and the tile in it that a program works on, tiles of ROWS tokens: (sequence, tile), the last
    tiles of a sequence, which see the most keys, first. Sequence ≥ S: nothing left to do. Chunks of skip_from tokens
    or more with nothing before them are left to others; 0: none are."""
    s = tl.arange(0, BLOCK_S)
    begin = tl.load(starts_ptr + s, mask=s < S, other=0)
    end = tl.load(starts_ptr + s + 1, mask=s < S, other=0)
    tiles = tl.cdiv(end - begin, ROWS)
    if skip_from > 0:
        length = tl.load(kv_lens_ptr + s, mask=s < S, other=0)
        tiles = tl.where((length == end - begin) & (length >= skip_from), 0, tiles)
    until = tl.cumsum(tiles, axis=0)
    seq = tl.sum((until <= wanted).to(tl.int32), axis=0)
    mine = s == seq
    count = tl.sum(tl.where(mine, tiles, 0), axis=0)
    before = tl.sum(tl.where(mine, until - tiles, 0), axis=0)
    return seq, count - 1 - (wanted - before)


@triton.jit
def _softmax_step(scores, m, l):  # noqa: E741
    """Scores in base 2 → weights, factor of what was summed before, new maximum and sum."""
    highest = tl.maximum(m, tl.max(scores, axis=1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores - safe[:, None])
    keep = tl.exp2(m - safe)
    return p, keep, highest, l * keep + tl.sum(p, axis=1)


@triton.jit(
    do_not_specialize=["window", "S", "skip_from", "stride_t"],
    do_not_specialize_on_alignment=["starts_ptr", "kv_lens_ptr"],
)
def paged_prefill(
    q_ptr, stride_m, k_cache_ptr, v_cache_ptr, tables_ptr, stride_t, starts_ptr, kv_lens_ptr, out_ptr,
    scale, window, S, H, G, skip_from,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SHARE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, WINDOW: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, G · SHARE / PACK). q [M, H, D] (rows stride_m apart) → out [M, H·D].

    A tile is BLOCK_M / PACK tokens times PACK of the SHARE = H / G heads that read one KV head; PACK is a power of 2
    and divides SHARE.
    """
    let_next_start(PDL)
    wait_for_inputs(PDL)
    ROWS: tl.constexpr = BLOCK_M // PACK
    seq, tile = _tile_of(starts_ptr, kv_lens_ptr, S, skip_from, tl.program_id(0), ROWS, BLOCK_S)
    if seq < S:
        head = tl.program_id(1) * PACK
        group = head // SHARE
        begin, end = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
        length = tl.load(kv_lens_ptr + seq)
        row = tl.arange(0, BLOCK_M)
        token = tile * ROWS + row // PACK
        inside = token < end - begin
        position = length - (end - begin) + token
        d = tl.arange(0, BLOCK_D)
        at = (begin + token).to(tl.int64)
        q_at = q_ptr + (at * stride_m + (head + row % PACK) * D)[:, None] + d[None, :]
        mask = inside[:, None] & (d < D)[None, :]
        q = tl.load(q_at, mask=mask, other=0.0)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        table = tables_ptr + seq.to(tl.int64) * stride_t
        per_block = G * BLOCK_SIZE * D
        n = tl.arange(0, BLOCK_N)
        low = length - (end - begin) + tile * ROWS  # position of the tile's first token
        last = tl.minimum(low + ROWS, length)  # keys beyond are seen by no row
        first = 0
        if WINDOW:
            first = tl.maximum(low - window + 1, 0)
        plain_until = first // BLOCK_N * BLOCK_N
        if not WINDOW:
            plain_until = (low + 1) // BLOCK_N * BLOCK_N  # keys all rows see: no mask
        for start in tl.range(0, plain_until if not WINDOW else 0, BLOCK_N, num_stages=STAGES):
            key = start + n
            block = tl.load(table + key // BLOCK_SIZE).to(tl.int64)
            places = block * per_block + (group * BLOCK_SIZE + key % BLOCK_SIZE) * D
            k = tl.load(k_cache_ptr + places[None, :] + d[:, None], mask=(d < D)[:, None], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision=EXACT) * (scale * 1.4426950408889634)
            p, keep, m, l = _softmax_step(scores, m, l)  # noqa: E741
            v = tl.load(v_cache_ptr + places[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
            total = tl.dot(p.to(q.dtype), v.to(q.dtype), total * keep[:, None], input_precision=EXACT)
        for start in tl.range(plain_until, last, BLOCK_N, num_stages=STAGES):
            key = start + n
            held = (key < last) & (key >= first)
            block = tl.where(held, tl.load(table + key // BLOCK_SIZE, mask=held, other=0), 0).to(tl.int64)
            places = block * per_block + (group * BLOCK_SIZE + key % BLOCK_SIZE) * D
            k = tl.load(k_cache_ptr + places[None, :] + d[:, None], mask=held[None, :] & (d < D)[:, None], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision=EXACT) * (scale * 1.4426950408889634)
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            p, keep, m, l = _softmax_step(scores, m, l)  # noqa: E741
            v = tl.load(v_cache_ptr + places[:, None] + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
            total = tl.dot(p.to(q.dtype), v.to(q.dtype), total * keep[:, None], input_precision=EXACT)
        out_at = out_ptr + (at * H * D + (head + row % PACK) * D)[:, None] + d[None, :]
        tl.store(out_at, (total / l[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fresh_step(
    q, k_tiles, v_tiles, start, m_at, factor, window, m, l, total,  # noqa: E741
    MASKED: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tile of keys from ``start`` on: new maximum, sum and mixed values. Not MASKED: all rows see all of them."""
    k = k_tiles.load([start, 0])
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)
        seen = key[None, :] <= m_at[:, None]
        if WINDOW:
            seen = seen & (key[None, :] > m_at[:, None] - window)
        p, keep, m, l = _softmax_step(tl.where(seen, scores * factor, float("-inf")), m, l)  # noqa: E741
    else:
        highest = tl.maximum(m, tl.max(scores, axis=1) * factor)
        p = tl.exp2(scores * factor - highest[:, None])
        keep = tl.exp2(m - highest)
        l = l * keep + tl.sum(p, axis=1)  # noqa: E741
        m = highest
    v = v_tiles.load([start, 0])
    return m, l, tl.dot(p.to(q.dtype), v, total * keep[:, None])


@triton.jit(do_not_specialize=["window", "S", "M"], do_not_specialize_on_alignment=["starts_ptr"])
def fresh_prefill(
    q_ptr, k_ptr, v_ptr, stride_m, starts_ptr, out_ptr, scale, window, M, S, H,
    D: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, H). Queries, keys, values [M, heads, D] with rows stride_m apart; every sequence starts at
    position 0, so the keys of a chunk are its own. D a power of 2."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    seq, tile = _tile_of(starts_ptr, starts_ptr, S, 0, tl.program_id(0), BLOCK_M, BLOCK_S)
    if seq < S:
        head = tl.program_id(1)
        begin, end = tl.load(starts_ptr + seq), tl.load(starts_ptr + seq + 1)
        # a descriptor ends with the sequence: rows beyond it read as zeros
        rows = end - begin
        at = begin.to(tl.int64) * stride_m
        k_tiles = tl.make_tensor_descriptor(
            k_ptr + at + (head // SHARE) * D, shape=[rows, D], strides=[stride_m, 1], block_shape=[BLOCK_N, D]
        )
        v_tiles = tl.make_tensor_descriptor(
            v_ptr + at + (head // SHARE) * D, shape=[rows, D], strides=[stride_m, 1], block_shape=[BLOCK_N, D]
        )
        m_at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        d = tl.arange(0, D)
        q_at = q_ptr + at + head * D + m_at[:, None].to(tl.int64) * stride_m + d[None, :]
        mask = (m_at < rows)[:, None]
        q = tl.load(q_at, mask=mask, other=0.0)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
        total = tl.zeros((BLOCK_M, D), tl.float32)
        factor = scale * 1.4426950408889634
        low = tile * BLOCK_M
        last = tl.minimum(low + BLOCK_M, rows)
        plain_until = low // BLOCK_N * BLOCK_N  # keys before are before every row
        first, plain_from = 0, 0
        if WINDOW:
            first = tl.maximum(low - window + 1, 0) // BLOCK_N * BLOCK_N
            inside = (
                tl.cdiv(tl.maximum(low + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
            )  # every row's window begins before
            plain_from = tl.minimum(tl.maximum(inside, first), plain_until)
            for start in tl.range(first, plain_from, BLOCK_N, num_stages=STAGES):
                m, l, total = _fresh_step(  # noqa: E741
                    q, k_tiles, v_tiles, start, m_at, factor, window, m, l, total, True, WINDOW, BLOCK_N
                )
        for start in tl.range(plain_from, plain_until, BLOCK_N, num_stages=STAGES):
            m, l, total = _fresh_step(  # noqa: E741
                q, k_tiles, v_tiles, start, m_at, factor, window, m, l, total, False, WINDOW, BLOCK_N
            )
        for start in tl.range(plain_until, last, BLOCK_N, num_stages=STAGES):
            m, l, total = _fresh_step(  # noqa: E741
                q, k_tiles, v_tiles, start, m_at, factor, window, m, l, total, True, WINDOW, BLOCK_N
            )
        out_at = out_ptr + ((begin + m_at).to(tl.int64) * H * D + head * D)[:, None] + d[None, :]
        tl.store(out_at, (total / l[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
