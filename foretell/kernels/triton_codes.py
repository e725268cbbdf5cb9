"""Codes of 8 or 4 bits in Triton: what they mean in registers, whole matrices of them, rows rounded to them."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from foretell.kernels.triton_common import let_next_start, wait_for_inputs

# four bytes → four bfloat16, of the lower codes: 0x4300 | code is 128 + code, of which 136 is subtracted
LOWER_CODES = tl.constexpr("""
{
    .reg .b32 a, b, one, minus;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xc308c308;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, a, one, minus;
    fma.rn.bf16x2 $1, b, one, minus;
}
""")
UPPER_CODES = tl.constexpr("""
{
    .reg .b32 a, b, c, one, minus;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xc308c308;
    shr.b32 c, $2, 4;
    prmt.b32 a, c, 0, 0x4140;
    prmt.b32 b, c, 0, 0x4342;
    lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, a, one, minus;
    fma.rn.bf16x2 $1, b, one, minus;
}
""")
# e4m3 → bfloat16: the exponent's 4 bits in place of 8 want 2^120
E4M3 = tl.constexpr("""
{
    .reg .b32 a, b, s, t, big, none;
    mov.b32 big, 0x7b807b80;
    mov.b32 none, 0x80008000;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    shr.b32 s, a, 4;
    shr.b32 t, b, 4;
    and.b32 a, a, 0x80008000;
    and.b32 b, b, 0x80008000;
    lop3.b32 a, s, 0x07f007f0, a, 0xea;
    lop3.b32 b, t, 0x07f007f0, b, 0xea;
    fma.rn.bf16x2 $0, a, big, none;
    fma.rn.bf16x2 $1, b, big, none;
}
""")


@triton.jit
def number(codes, kind: tl.constexpr, ASM: tl.constexpr):
    """Codes of 8 bits in type ``kind``, exactly."""
    if codes.dtype == tl.int8:
        numbers = codes.to(tl.float32).to(kind)
    elif ASM:
        numbers = tl.inline_asm_elementwise(E4M3, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        numbers = codes.to(kind)
    return numbers


@triton.jit
def lower(codes, kind: tl.constexpr, ASM: tl.constexpr):
    """Bytes → what their lower codes stand for, -8 … 7, in type ``kind``."""
    if ASM:
        numbers = tl.inline_asm_elementwise(
            LOWER_CODES, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        numbers = ((codes & 15).to(tl.float32) - 8.0).to(kind)
    return numbers


@triton.jit
def upper(codes, kind: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        numbers = tl.inline_asm_elementwise(
            UPPER_CODES, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        numbers = ((codes >> 4).to(tl.float32) - 8.0).to(kind)
    return numbers


@triton.jit
def expand(
    codes_ptr, scales_ptr, out_ptr, N, K,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes → out [N, K], for products of many rows. Grid (tiles of N, steps of K as in ``quantised_rows``)."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    n, step = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None]
    held = tl.where(n < N, n, 0)
    out_rows = out_ptr + held.to(tl.int64)[:, None] * K
    if GROUP == 0:
        at = (step * BLOCK_K + k)[None, :]
        codes = tl.load(codes_ptr + held.to(tl.int64)[:, None] * K + at, mask=at < K, other=0.0)
        values = codes.to(tl.float32) * tl.load(scales_ptr + held)[:, None]
        tl.store(out_rows + at, values.to(out_ptr.dtype.element_ty), mask=inside & (at < K))
    else:
        at = (step * 2 * GROUP + k)[None, :]
        width = tl.cdiv(K, 2 * GROUP) * GROUP
        codes = tl.load(codes_ptr + held.to(tl.int64)[:, None] * width + (step * GROUP + k)[None, :])
        scales = scales_ptr + step.to(tl.int64) * 2 * N + held
        low = lower(codes, tl.float32, False) * tl.load(scales).to(tl.float32)[:, None]
        high = upper(codes, tl.float32, False) * tl.load(scales + N).to(tl.float32)[:, None]
        tl.store(out_rows + at, low.to(out_ptr.dtype.element_ty), mask=inside & (at < K))
        tl.store(out_rows + at + GROUP, high.to(out_ptr.dtype.element_ty), mask=inside & (at + GROUP < K))


@triton.jit
def round_rows(
    x_ptr, stride_x, codes_ptr, scales_ptr, K, LARGEST: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr
):
    """A row of x a program: codes [M, K] = x / scale, scales [M] = max|x| / LARGEST."""
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_x + start + k, mask=start + k < K, other=0.0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    scale = tl.maximum(tl.max(largest, axis=0) / LARGEST, 1e-30)
    tl.store(scales_ptr + row, scale)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + row * stride_x + start + k, mask=start + k < K, other=0.0)
        codes = (x.to(tl.float32) / scale).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + row * K + start + k, codes, mask=start + k < K)
