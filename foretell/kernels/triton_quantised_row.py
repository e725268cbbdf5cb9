"""One row times a weight matrix in codes of 8 bits: no matrix unit, every thread keeps wide loads open."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import activated, let_next_start, wait_for_inputs


@triton.jit
def one_quantised_row(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, y_ptr, N, K,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] = x [K] · w [N, K]ᵀ + bias of codes of 8 bits, without the matrix unit; KIND as below."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < N
    held = tl.where(inside, n, 0)
    rows = codes_ptr + held.to(tl.int64)[:, None] * K
    far = N.to(tl.int64) * K
    codes = tl.load(rows + k, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    codes_up = codes
    if KIND != "":
        codes_up = tl.load(rows + far + k, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    scale = tl.load(scales_ptr + held)
    wait_for_inputs(PDL)
    let_next_start(PDL)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    total = codes.to(tl.float32) * x
    total_up = codes_up.to(tl.float32) * x
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        codes = tl.load(rows + at, mask=(at < K)[None, :], other=0.0, eviction_policy="evict_first")
        if KIND != "":
            codes_up = tl.load(rows + far + at, mask=(at < K)[None, :], other=0.0, eviction_policy="evict_first")
            total_up += codes_up.to(tl.float32) * x
        total += codes.to(tl.float32) * x
    y = tl.sum(total, axis=1) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + held)
    if KIND != "":
        up = tl.sum(total_up, axis=1) * tl.load(scales_ptr + N + held)
        if HAS_BIAS:
            up += tl.load(bias_ptr + N + held)
        y = activated(y, KIND) * up
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=inside)
