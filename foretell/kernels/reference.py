"""The kernels in plain torch: any device, any dtype. What the other backends are measured against,
and what runs when no compiler is there to build them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.config import Activation, ModelSpec
from foretell.kernels.base import BatchContext, HeadNorms, KVLayer, Linear

QUERY_ROWS = 512  # query rows per mask: bounds the mask and score memory of a long prefill chunk


class ReferenceLinear:
    """x · Wᵀ + b with the weight as it came, or as a float32 copy where that is the faster product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        if weight.device.type == "cpu" and not (weight.dtype == torch.bfloat16 and fast_bfloat16()):
            weight = weight.float()
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.detach().clone()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        if x.dtype == dtype:
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x, self.weight, bias)
        y = F.linear(x.to(dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class ReferenceKernels:
    """See ``Kernels``; ``reason`` says why this backend was chosen, where it was not asked for."""

    name = "reference"
    defers_sums = False

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def prepare(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        block_size: int,
        device: torch.device,
        *,
        kv_dtype: torch.dtype,
        quantization: str | None,
    ) -> Callable[[], None]:
        return lambda: None

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return ReferenceLinear(weight, bias)

    def pack_quantised(self, raw: Tensor, quant_type: str, bias: Tensor | None) -> Linear | None:
        return None  # a product in torch needs the numbers

    def quantise_linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear | None:
        return None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, y_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x + (y if y_weight is None else self.rms_norm(y, y_weight, eps))
        return self.rms_norm(x, weight, eps), x

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        wide_bias = None if bias is None else bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight.float(), wide_bias, eps).to(x.dtype)

    def activate(self, x: Tensor, kind: Activation) -> Tensor:
        match kind:
            case "silu":
                return F.silu(x)
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "relu":
                return F.relu(x)

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activate(gate, kind) * up

    def gated_linear(self, linear: Linear, x: Tensor, kind: Activation) -> Tensor:
        return self.gated_activation(linear(x), kind)

    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        half = cos.shape[-1]
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        low, high = x[..., :half].float(), x[..., half : 2 * half].float()
        rotated = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
        x[..., : 2 * half] = rotated.to(x.dtype)

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, context: BatchContext) -> None:
        slots = context.groups[kv.group].slots
        block = torch.div(slots, context.block_size, rounding_mode="floor")
        offset = slots - block * context.block_size
        kv.k[block, :, offset] = k.to(kv.k.dtype)
        kv.v[block, :, offset] = v.to(kv.v.dtype)

    def attention(self, q: Tensor, kv: KVLayer, context: BatchContext, scale: float, window: int | None) -> Tensor:
        tables = context.groups[kv.group].block_tables
        if context.max_query_len == 1 and q.shape[0] == tables.shape[0]:
            return _decode_attention(q, kv, tables, context, scale, window)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        starts, lens = context.query_starts.tolist(), context.kv_lens.tolist()
        for s, kv_len in enumerate(lens):
            for first in range(starts[s], starts[s + 1], QUERY_ROWS):
                last = min(first + QUERY_ROWS, starts[s + 1])
                position = kv_len - (starts[s + 1] - first)
                visible = position + last - first
                out[first:last] = _chunk_attention(q[first:last], kv, tables[s], visible, scale, window)
        return out.flatten(1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        rotation: tuple[Tensor, Tensor] | None,
        kv: KVLayer,
        context: BatchContext,
        scale: float,
        window: int | None,
    ) -> Tensor:
        if norms is not None:
            q = self.rms_norm(q.contiguous(), norms.q, norms.eps)
            k = self.rms_norm(k.contiguous(), norms.k, norms.eps)
        if rotation is not None:
            self.rope_(q, *rotation)
            self.rope_(k, *rotation)
        self.write_kv(k, v, kv, context)
        mixed = self.attention(q, kv, context, scale, window)
        return mixed if context.last_rows is None else mixed.index_select(0, context.last_rows)


def _chunk_attention(q: Tensor, kv: KVLayer, table: Tensor, kv_len: int, scale: float, window: int | None) -> Tensor:
    """Rows q [n, H, D] of one sequence, the last of which sees keys up to kv_len - 1."""
    n, block_size = q.shape[0], kv.k.shape[2]
    first_key = 0 if window is None else max(0, kv_len - n - window + 1)
    first_block = first_key // block_size
    blocks = table[first_block : -(-kv_len // block_size)].long()
    inside = slice(first_key - first_block * block_size, kv_len - first_block * block_size)
    k, v = (c[blocks].transpose(0, 1).flatten(1, 2)[:, inside].to(q.dtype) for c in (kv.k, kv.v))
    rows = torch.arange(kv_len - n, kv_len, device=q.device)[:, None]
    keys = torch.arange(first_key, kv_len, device=q.device)[None, :]
    mask = keys <= rows
    if window is not None:
        mask &= keys > rows - window
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return y[0].transpose(0, 1)


def _decode_attention(
    q: Tensor, kv: KVLayer, tables: Tensor, context: BatchContext, scale: float, window: int | None
) -> Tensor:
    """One row per sequence: gather every sequence's blocks, padded to the longest, without a device sync."""
    S, H, D = q.shape
    G, block_size = kv.k.shape[1], context.block_size
    lens = context.kv_lens.long()[:, None]
    span = context.max_kv_len if window is None else min(context.max_kv_len, window + block_size - 1)
    first_block = torch.zeros_like(lens) if window is None else (lens - window).clamp(min=0) // block_size
    index = first_block + torch.arange(-(-span // block_size), device=q.device)
    in_use = index * block_size < lens
    blocks = torch.where(in_use, tables.gather(1, index.clamp(max=tables.shape[1] - 1).long()), 0).long()
    keys = (index[:, :, None] * block_size + torch.arange(block_size, device=q.device)).flatten(1)
    mask = keys < lens
    if window is not None:
        mask &= keys >= lens - window
    k, v = (c[blocks].transpose(1, 2).reshape(S, G, -1, D).to(q.dtype) for c in (kv.k, kv.v))
    # Slots never written may hold NaN, and NaN times a zero weight is NaN: clear what the mask hides.
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    # The heads of one KV head become its query rows: no repetition of K and V.
    y = F.scaled_dot_product_attention(
        q.reshape(S, G, H // G, D), k, v, attn_mask=mask[:, None, None, :], scale=scale
    )
    return y.reshape(S, H * D)


@cache
def fast_bfloat16() -> bool:
    """Whether a bfloat16 product on this CPU beats the float32 one, measured once (some 10 ms)."""
    w = torch.ones(512, 512)
    x = torch.ones(128, 512)
    return _best_seconds(x.bfloat16(), w.bfloat16()) < _best_seconds(x, w)


def _best_seconds(x: Tensor, w: Tensor) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        F.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best
