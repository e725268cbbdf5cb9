"""What stands between the products: norms with the residual sum, gated activations, heads to the cache."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import activated, let_next_start, wait_for_inputs


@triton.jit
def _row(ptr, c, C):
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _rounded(x, ptr, c, C):
    """x as it is stored."""
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + c, x, mask=c < C)
    return x.to(tl.float32)


@triton.jit
def _mean_square(x, rest, C):
    return (tl.sum(x * x, axis=0) + tl.sum(rest * rest, axis=0)) / C


@triton.jit
def rms_norm(
    x_ptr, y_ptr, weight_ptr, y_weight_ptr, normed_ptr, sum_ptr, C, eps,
    ADD: tl.constexpr, NORM_Y: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row a program: normed = rms_norm(x) or, with ADD, of sum = x + y, rounded to its dtype first. NORM_Y: y is
    normed before it is added, and rounded then as well. C ≤ BLOCK_C + BLOCK_REST: two powers of 2 fit most widths."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64) * C
    c, r = tl.arange(0, BLOCK_C), BLOCK_C + tl.arange(0, BLOCK_REST)
    weight, weight_rest = _row(weight_ptr, c, C), _row(weight_ptr, r, C)
    y_weight, y_weight_rest = weight, weight_rest
    if NORM_Y:
        y_weight, y_weight_rest = _row(y_weight_ptr, c, C), _row(y_weight_ptr, r, C)
    wait_for_inputs(PDL)
    x, rest = _row(x_ptr + row, c, C), _row(x_ptr + row, r, C)
    if ADD:
        y, y_rest = _row(y_ptr + row, c, C), _row(y_ptr + row, r, C)
        if NORM_Y:
            scale = tl.rsqrt(_mean_square(y, y_rest, C) + eps)
            y = (y * scale * y_weight).to(sum_ptr.dtype.element_ty).to(tl.float32)
            y_rest = (y_rest * scale * y_weight_rest).to(sum_ptr.dtype.element_ty).to(tl.float32)
        x, rest = _rounded(x + y, sum_ptr + row, c, C), _rounded(rest + y_rest, sum_ptr + row, r, C)
    scale = tl.rsqrt(_mean_square(x, rest, C) + eps)
    _rounded(x * scale * weight, normed_ptr + row, c, C)
    _rounded(rest * scale * weight_rest, normed_ptr + row, r, C)


@triton.jit
def gated_activation(
    gate_up_ptr, stride, y_ptr, F, KIND: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """[M, 2F] (gate | up) → act(gate) · up, a row and BLOCK_F columns a program."""
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    wait_for_inputs(PDL)
    gate = tl.load(gate_up_ptr + row * stride + f, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + F + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + f, (activated(gate, KIND) * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def place_heads(
    qkv_ptr, stride_m, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, eps,
    k_cache_ptr, v_cache_ptr, slots_ptr, H, G,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token and BLOCK_HEADS of its H + 2G heads: q and k normed (NORM) and rotated in place (first 2R dims),
    k and v stored at the token's slot in the cache [blocks, G, BLOCK_SIZE, D]. Slots below 0 are not written."""
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_head, is_q, is_v = head < H + 2 * G, head < H, head >= H + G
    turned = is_head & (head < H + G)
    wait_for_inputs(PDL)
    slot = tl.load(slots_ptr + token)
    group = tl.where(is_v, head - H - G, head - H)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    kept = ((block * G + group) * BLOCK_SIZE + offset) * D
    is_kept = is_head & (head >= H) & (slot >= 0)
    base = qkv_ptr + token * stride_m + head[:, None] * D
    r = tl.arange(0, BLOCK_R)
    pair = is_head[:, None] & (r < R)[None, :]
    low = tl.load(base + r, mask=pair, other=0.0).to(tl.float32)
    high = tl.load(base + R + r, mask=pair, other=0.0).to(tl.float32)
    rest = tl.zeros((BLOCK_HEADS, BLOCK_D), tl.float32)
    d = 2 * R + tl.arange(0, BLOCK_D)
    beyond = is_head[:, None] & (d < D)[None, :]
    if 2 * R < D:
        rest = tl.load(base + d, mask=beyond, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1) + tl.sum(rest * rest, axis=1)
        scale = tl.where(turned, tl.rsqrt(squares / D + eps), 1.0)[:, None]
        low = _normed(low, scale, q_weight_ptr, k_weight_ptr, r, r < R, is_q, turned, base)
        high = _normed(high, scale, q_weight_ptr, k_weight_ptr, R + r, r < R, is_q, turned, base)
        if 2 * R < D:
            rest = _normed(rest, scale, q_weight_ptr, k_weight_ptr, d, d < D, is_q, turned, base)
    if R > 0:
        c = tl.load(cos_ptr + token * R + r, mask=r < R, other=1.0)[None, :]
        s = tl.load(sin_ptr + token * R + r, mask=r < R, other=0.0)[None, :]
        c, s = tl.where(turned[:, None], c, 1.0), tl.where(turned[:, None], s, 0.0)
        low, high = low * c - high * s, high * c + low * s
    kind = qkv_ptr.dtype.element_ty
    tl.store(base + r, low.to(kind), mask=pair & turned[:, None])
    tl.store(base + R + r, high.to(kind), mask=pair & turned[:, None])
    cache = k_cache_ptr.dtype.element_ty
    low, high, rest = low.to(kind).to(cache), high.to(kind).to(cache), rest.to(kind).to(cache)
    k_kept, v_kept = (is_kept & ~is_v)[:, None], (is_kept & is_v)[:, None]
    tl.store(k_cache_ptr + kept[:, None] + r, low, mask=pair & k_kept)
    tl.store(k_cache_ptr + kept[:, None] + R + r, high, mask=pair & k_kept)
    tl.store(v_cache_ptr + kept[:, None] + r, low, mask=pair & v_kept)
    tl.store(v_cache_ptr + kept[:, None] + R + r, high, mask=pair & v_kept)
    if 2 * R < D:
        if NORM:
            tl.store(base + d, rest.to(kind), mask=beyond & turned[:, None])
        tl.store(k_cache_ptr + kept[:, None] + d, rest, mask=beyond & k_kept)
        tl.store(v_cache_ptr + kept[:, None] + d, rest, mask=beyond & v_kept)


@triton.jit
def _normed(x, scale, q_weight_ptr, k_weight_ptr, at, inside, is_q, turned, base):
    """Heads times their norm's scale and weight, rounded as a norm of its own would."""
    q_weight = tl.load(q_weight_ptr + at, mask=inside, other=0.0)[None, :]
    k_weight = tl.load(k_weight_ptr + at, mask=inside, other=0.0)[None, :]
    weight = tl.where(is_q[:, None], q_weight, k_weight)
    return tl.where(turned[:, None], (x * scale * weight).to(base.dtype.element_ty).to(tl.float32), x)
