"""Products of few rows with a weight matrix: bound by reading the weights, so built around keeping reads in flight.

One row needs no matrix unit: every thread keeps wide loads open and sums in float32. 2 … 64 rows go through it in
tiles; where the weight has too few rows to occupy the card, K is split and the program that arrives last adds the
parts up, always in the same order: results do not depend on timing.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import activated, let_next_start, prefetch, wait_for_inputs


@triton.jit
def one_row(
    x_ptr, w_ptr, bias_ptr, y_ptr, N, K,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = x [K] · w [N, K]ᵀ + bias; with KIND, w is [gate; up] of 2N rows and y = act(gate) · up."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    rows = w_ptr + n.to(tl.int64)[:, None] * K
    w = tl.load(rows + k, mask=inside[:, None] & (k < K), other=0.0, eviction_policy="evict_first")
    gated = w
    far = N.to(tl.int64) * K
    if KIND != "":
        gated = tl.load(rows + far + k, mask=inside[:, None] & (k < K), other=0.0, eviction_policy="evict_first")
    wait_for_inputs(PDL)
    let_next_start(PDL)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    total = w.to(tl.float32) * x
    total_up = gated.to(tl.float32) * x
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        w = tl.load(rows + at, mask=inside[:, None] & (at < K), other=0.0, eviction_policy="evict_first")
        if KIND != "":
            gated = tl.load(
                rows + far + at, mask=inside[:, None] & (at < K), other=0.0, eviction_policy="evict_first"
            )
            total_up += gated.to(tl.float32) * x
        total += w.to(tl.float32) * x
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0)
    if KIND != "":
        up = tl.sum(total_up, axis=1)
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + n, mask=inside, other=0.0)
        y = activated(y, KIND) * up
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _added(total, x, w, WEIGHTS_FIRST: tl.constexpr, EXACT: tl.constexpr):
    """total + x [M, K] · w [N, K]ᵀ, or its transpose."""
    if WEIGHTS_FIRST:
        total = tl.dot(w, tl.trans(x), total, input_precision=EXACT)
    else:
        total = tl.dot(x, tl.trans(w), total, input_precision=EXACT)
    return total


@triton.jit(do_not_specialize=["M"])
def few_rows(
    x_ptr, stride_x, w_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr, M, N, K,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr, MASKED: tl.constexpr, ONCE: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] · w [N, K]ᵀ + bias; KIND as in ``one_row``. Grid (tiles of M, tiles of N, SPLITS): tiles
    of M that read the same weights run together. SPLIT: K is split.

    WEIGHTS_FIRST: the product is computed transposed, weights being the operand with many rows (wgmma wants 64).
    MASKED: rows of a tile beyond the last of x are zeros; else they repeat others.
    ONCE: a program's share of K is one BLOCK_K, whose weights are loaded before the inputs are there; else
    AHEAD: elements of each weight row that are asked for before the inputs are there.
    """
    tile, split, SPLITS = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(K, BLOCK_K)
    per_split = tl.cdiv(steps, SPLITS)
    begin = split * per_split * BLOCK_K
    end = tl.minimum(begin + per_split * BLOCK_K, K)
    rows = w_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    far = N.to(tl.int64) * K
    # rows beyond the last repeat others, or read nothing: all of them reading one would wait for its place in the L2
    x_rows = x_ptr + (m % M)[:, None].to(tl.int64) * stride_x
    real = (m < M)[:, None]
    if WEIGHTS_FIRST:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        total_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if ONCE:
        at = begin + k
        held = (at < end)[None, :]
        w = tl.load(rows + at[None, :], mask=held, other=0.0)
        up = w
        if KIND != "":
            up = tl.load(rows + far + at[None, :], mask=held, other=0.0)
        wait_for_inputs(PDL)
        let_next_start(PDL)
        if MASKED:
            held = held & real
        x = tl.load(x_rows + at[None, :], mask=held, other=0.0)
        total = _added(total, x, w, WEIGHTS_FIRST, EXACT)
        if KIND != "":
            total_up = _added(total_up, x, up, WEIGHTS_FIRST, EXACT)
    else:
        if PDL:
            line = begin + tl.arange(0, AHEAD // 64) * 64
            line = tl.where(line < K, line, 0)
            prefetch(rows + line[None, :], PDL)
            if KIND != "":
                prefetch(rows + far + line[None, :], PDL)
        wait_for_inputs(PDL)
        let_next_start(PDL)
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            at = start + k
            held = at[None, :] < K
            if MASKED:
                held = held & real
            x = tl.load(x_rows + at[None, :], mask=held, other=0.0)
            w = tl.load(rows + at[None, :], mask=at[None, :] < K, other=0.0)
            total = _added(total, x, w, WEIGHTS_FIRST, EXACT)
            if KIND != "":
                up = tl.load(rows + far + at[None, :], mask=at[None, :] < K, other=0.0)
                total_up = _added(total_up, x, up, WEIGHTS_FIRST, EXACT)
    if WEIGHTS_FIRST:
        total, total_up = tl.trans(total), tl.trans(total_up)
    inside = (m < M)[:, None] & (n < N)[None, :]
    last = True
    if SPLIT:
        # parts [SPLITS, rows, columns]: the last program of a tile to arrive adds them up in order
        columns, arrived_ptr = tl.num_programs(1) * BLOCK_N, arrived_ptr + tl.program_id(0) * tl.num_programs(1)
        place = parts_ptr + m[:, None] * columns + n[None, :]
        step = tl.num_programs(0) * BLOCK_M * columns
        up_part = SPLITS * step
        tl.store(place + split * step, total, mask=inside)
        if KIND != "":
            tl.store(place + up_part + split * step, total_up, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for four in range(0, SPLITS, 4):
                for i in tl.static_range(4):  # four loads are under way at once
                    there = inside & (four + i < SPLITS)
                    at_part = place + (four + i) * step
                    total += tl.load(at_part, mask=there, other=0.0, cache_modifier=".cg")
                    if KIND != "":
                        total_up += tl.load(at_part + up_part, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    if last:
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
        if KIND != "":
            if HAS_BIAS:
                total_up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0)[None, :]
            total = activated(total, KIND) * total_up
        tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)
