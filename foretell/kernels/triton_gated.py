"""Many rows through [gate; up] with the activation behind it in one kernel: what the product would write, and the
activation read again, is twice what the layer gives.

Bound by the matrix unit. Programs stay and take one tile after the other; the copy engine fetches the next one's
operands while the last one's activation is computed.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import activated, let_next_start, wait_for_inputs


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _power_of_2(x):
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _gated(gate, up, KIND: tl.constexpr, FAST: tl.constexpr):
    """act(gate) · up. FAST: in as few instructions as float32 allows, for the matrix unit waits meanwhile."""
    if FAST and KIND == "silu":
        y = gate * up * _reciprocal(1.0 + _power_of_2(gate * -1.4426950408889634))
    elif FAST and KIND == "gelu_tanh":
        y = gate * up * _reciprocal(1.0 + _power_of_2(gate * (-2.302208198 - 0.1029432397 * gate * gate)))
    else:
        y = activated(gate, KIND) * up
    return y


@triton.jit
def _place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, column by column, so that both operands stay in L2."""
    wide = GROUP * columns
    first = tile // wide * GROUP
    high = tl.minimum(rows - first, GROUP)
    return first + tile % wide % high, tile % wide // high


@triton.jit(do_not_specialize=["M"])
def gated_rows(
    x_ptr, w_ptr, y_ptr, M, F, K,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, F] = act(x · gateᵀ) · (x · upᵀ); x [M, K], w [2F, K] the rows of gate, then up. F and K are multiples
    of 8. Any grid of one dimension."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    x_tiles = tl.make_tensor_descriptor(x_ptr, shape=[M, K], strides=[K, 1], block_shape=[BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(
        w_ptr, shape=[2, F, K], strides=[F.to(tl.int64) * K, K, 1], block_shape=[2, BLOCK_F, BLOCK_K]
    )
    y_tiles = tl.make_tensor_descriptor(y_ptr, shape=[M, F], strides=[F, 1], block_shape=[BLOCK_M, BLOCK_F])
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_F)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=True):
        m, f = _place(tile, rows, columns, GROUP)
        total = tl.zeros((BLOCK_M, 2 * BLOCK_F), tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
            x = x_tiles.load([m * BLOCK_M, k * BLOCK_K])
            w = w_tiles.load([0, f * BLOCK_F, k * BLOCK_K]).reshape(2 * BLOCK_F, BLOCK_K)
            total = tl.dot(x, w.T, total)
        gate, up = tl.split(total.reshape(BLOCK_M, 2, BLOCK_F).permute(0, 2, 1))
        y_tiles.store([m * BLOCK_M, f * BLOCK_F], _gated(gate, up, KIND, PDL).to(y_ptr.dtype.element_ty))
