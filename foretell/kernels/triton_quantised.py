"""Products of rows with a weight matrix kept in codes of 8 or 4 bits: bound by reading the codes.

Codes become numbers of the inputs' dtype in registers, on their way from memory to the matrix unit; scales are
applied to sums, not to weights, so nothing is rounded but the codes themselves. Where the matrix has too few rows to
occupy the card, K is split as in foretell.kernels.triton_linear: the last program of a tile adds up in order.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_codes import lower, number, upper
from foretell.kernels.triton_common import activated, let_next_start, prefetch, wait_for_inputs


@triton.jit
def _pair_added(total, bytes_at, low_scale, high_scale, x, x_next, ASM: tl.constexpr):
    """total [m, n] + what a pair of groups adds. The bytes are loaded once for each half: a tile with one use goes
    from shared memory straight to the matrix unit's registers, one with two would be written back between."""
    low = lower(tl.load(bytes_at), x.dtype, ASM)
    total += tl.dot(x, tl.trans(low)) * low_scale.to(tl.float32)[None, :]
    high = upper(tl.load(bytes_at, eviction_policy="evict_first"), x.dtype, ASM)
    total += tl.dot(x_next, tl.trans(high)) * high_scale.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["M"])
def quantised_rows(
    x_ptr, stride_x, codes_ptr, scales_ptr, bias_ptr, y_ptr, parts_ptr, arrived_ptr, M, N, K,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] · w [N, K]ᵀ + bias; with KIND, w is [gate; up] of 2N rows and y = act(gate) · up. Grid
    (tiles of N, SPLITS, tiles of M); SPLIT: there are several, and M ≤ BLOCK_M.

    GROUP 0: codes [N, K] of 8 bits, a scale for each row. Else two groups share their bytes (formats.PerGroup), a
    step is one such pair and BLOCK_K = GROUP. BLOCK_M < 64: the matrix unit then takes both operands from registers,
    where codes become numbers; for wider tiles (wgmma) they would go through shared memory once more.
    """
    PAIR: tl.constexpr = 1 if GROUP == 0 else 2
    STEP: tl.constexpr = BLOCK_K * PAIR
    tile, split, SPLITS = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    per_split = tl.cdiv(tl.cdiv(K, STEP), SPLITS)
    begin = split * per_split * STEP
    end = tl.minimum(begin + per_split * STEP, K)
    held = tl.where(n < N, n, 0)
    N_ALL = N
    if KIND != "":
        N_ALL = 2 * N
    x_rows = x_ptr + tl.where(m < M, m, 0)[:, None].to(tl.int64) * stride_x
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    width = K
    if GROUP != 0:
        width = tl.cdiv(K, 2 * GROUP) * GROUP  # bytes of a row
    rows = codes_ptr + held.to(tl.int64)[:, None] * width
    far = N.to(tl.int64) * width
    if PDL:
        lines = rows + begin // PAIR + tl.arange(0, 2)[None, :] * 128
        prefetch(lines, PDL)
        if KIND != "":
            prefetch(lines + far, PDL)
    if GROUP == 0:
        wait_for_inputs(PDL)
        let_next_start(PDL)
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            at = (start + k)[None, :]
            x = tl.load(x_rows + at, mask=at < K, other=0.0)
            codes = tl.load(rows + at, mask=at < K, other=0.0)
            total = tl.dot(x, tl.trans(number(codes, x.dtype, ASM)), total)
            if KIND != "":
                codes = tl.load(rows + far + at, mask=at < K, other=0.0)
                total_up = tl.dot(x, tl.trans(number(codes, x.dtype, ASM)), total_up)
        total *= tl.load(scales_ptr + held)[None, :]
        if KIND != "":
            total_up *= tl.load(scales_ptr + held + N)[None, :]
    else:
        # a step's scales are loaded during the step before
        scales = scales_ptr + held
        scales_at = (begin // GROUP).to(tl.int64) * N_ALL
        low, high = tl.load(scales + scales_at), tl.load(scales + scales_at + N_ALL)
        low_up, high_up = low, high
        if KIND != "":
            low_up, high_up = tl.load(scales + scales_at + N), tl.load(scales + scales_at + N_ALL + N)
        wait_for_inputs(PDL)
        let_next_start(PDL)
        for start in tl.range(begin, end, STEP, num_stages=STAGES):
            scales_at += 2 * N_ALL
            more = (held < N) & (start + STEP < end)
            next_low = tl.load(scales + scales_at, mask=more, other=0)
            next_high = tl.load(scales + scales_at + N_ALL, mask=more, other=0)
            at = (start + k)[None, :]
            x = tl.load(x_rows + at, mask=at < K, other=0.0)
            x_next = tl.load(x_rows + GROUP + at, mask=GROUP + at < K, other=0.0)
            bytes_at = rows + (start // 2 + k)[None, :]
            total = _pair_added(total, bytes_at, low, high, x, x_next, ASM)
            if KIND != "":
                total_up = _pair_added(total_up, bytes_at + far, low_up, high_up, x, x_next, ASM)
                low_up = tl.load(scales + scales_at + N, mask=more, other=0)
                high_up = tl.load(scales + scales_at + N_ALL + N, mask=more, other=0)
            low, high = next_low, next_high
    inside = (m < M)[:, None] & (n < N)[None, :]
    last = True
    if SPLIT:
        # parts [1 or 2, SPLITS, BLOCK_M, columns]
        columns = tl.num_programs(0) * BLOCK_N
        place = parts_ptr + m[:, None] * columns + n[None, :]
        step = BLOCK_M * columns
        tl.store(place + split * step, total, mask=inside)
        if KIND != "":
            tl.store(place + (SPLITS + split) * step, total_up, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            tl.debug_barrier()
            total = _sum_of_parts(place, step, SPLITS, inside, BLOCK_M, BLOCK_N)
            if KIND != "":
                total_up = _sum_of_parts(place + SPLITS * step, step, SPLITS, inside, BLOCK_M, BLOCK_N)
            tl.store(arrived_ptr + tile, 0)
    if last:
        if HAS_BIAS:
            total += tl.load(bias_ptr + held)[None, :]
        if KIND != "":
            if HAS_BIAS:
                total_up += tl.load(bias_ptr + N + held)[None, :]
            total = activated(total, KIND) * total_up
        tl.store(y_ptr + m[:, None].to(tl.int64) * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_parts(place, step, SPLITS, inside, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for four in range(0, SPLITS, 4):
        for i in tl.static_range(4):  # four loads are under way at once
            total += tl.load(
                place + (four + i) * step, mask=inside & (four + i < SPLITS), other=0.0, cache_modifier=".cg"
            )
    return total
