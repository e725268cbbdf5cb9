"""The C++ kernels behind the ``Kernels`` interface: float32 activations, weights and cache in three formats.

A call costs a few microseconds in Python, so arguments are plain addresses and whatever a weight needs is
looked up once, when it is packed. Inputs the C++ side does not take (other dtypes, odd strides) go to the
reference kernels or are copied first.
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from foretell.config import Activation
from foretell.kernels.base import BatchContext, KVLayer, Linear
from foretell.kernels.cpu_build import load_library
from foretell.kernels.cpu_packed import PackedLinear
from foretell.kernels.cpu_quant import SIGNATURES as QUANT_SIGNATURES
from foretell.kernels.cpu_quant import CpuQuantLinear, is_packable
from foretell.kernels.reference import ReferenceKernels

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

_P, _L, _I, _F = c_void_p, c_int64, c_int, c_float
SIGNATURES = QUANT_SIGNATURES | {
    "ft_set_threads": (_I,),
    "ft_rounds_activations": (),
    "ft_packed_words": (_L, _L, _I),
    "ft_pack_weight": (_P, _L, _L, _L, _I, _P),
    "ft_linear": (_P, _L, _L, _L, _L, _P, _P, _P, _I, _I),
    "ft_rms_norm": (_P, _P, _L, _L, _L, _L, _L, _F, _P),
    "ft_layer_norm": (_P, _P, _P, _L, _L, _L, _F, _P),
    "ft_activate": (_P, _P, _L, _L, _L, _I, _P),
    "ft_rope": (_P, _L, _L, _L, _L, _P, _P, _L),
    "ft_attention": (_P, _L, _L, _P, _P, _P, _L, _P, _P, _L, _L, _L, _L, _L, _L, _F, _P, _I),
    "ft_write_kv": (_P, _P, _L, _L, _L, _L, _L, _L, _L, _P, _L, _P, _P, _I),
}
RESULTS = {"ft_packed_words": _L, "ft_quant_bytes": _L, "ft_rounds_activations": _I}


class CpuLinear(PackedLinear):
    """A weight packed in panels of 32 columns; the only copy, in the dtype it came in.

    Activations stay float32, except that a CPU with bfloat16 dot products rounds those of six rows or more
    for a bfloat16 weight, unless ``exact``.
    """

    __slots__ = ()

    def __init__(self, lib: CDLL, weight: Tensor, bias: Tensor | None, exact: bool) -> None:
        N, K = weight.shape
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        number_format = FORMATS[weight.dtype]
        packed = torch.empty(lib.ft_packed_words(N, K, number_format), dtype=torch.int32)
        row_bytes = weight.stride(0) * weight.element_size()
        lib.ft_pack_weight(weight.data_ptr(), N, K, row_bytes, number_format, packed.data_ptr())
        super().__init__((N, K), packed, bias, lib.ft_linear, (number_format, int(exact)))


class CpuKernels(ReferenceKernels):
    """Threads are those torch has at construction, in one pool shared with it.

    Every result is the same bits whatever the batch, the chunk or the threads; only a CPU with bfloat16 dot
    products needs ``batch_invariant`` for that (see ``CpuLinear``).
    """

    name = "cpu"

    def __init__(self, batch_invariant: bool = False) -> None:
        super().__init__()
        self.batch_invariant = batch_invariant
        self._lib = load_library()
        for function, arguments in SIGNATURES.items():
            getattr(self._lib, function).argtypes = arguments
            getattr(self._lib, function).restype = RESULTS.get(function)
        self._checked: BatchContext | None = None
        self.set_threads(torch.get_num_threads())

    def set_threads(self, count: int) -> None:
        """Threads of every kernel in this process; a result does not depend on it."""
        self._lib.ft_set_threads(count)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if weight.dtype not in FORMATS or weight.device.type != "cpu":
            return super().pack_linear(weight, bias)
        return CpuLinear(self._lib, weight, bias, self.batch_invariant)

    def pack_quantised(self, raw: Tensor, quant_type: str, bias: Tensor | None) -> Linear | None:
        if not is_packable(raw, quant_type):
            return None
        return CpuQuantLinear(self._lib, raw, quant_type, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
            return super().rms_norm(x, weight, eps)
        C = x.shape[-1]
        if x.dim() == 3 and x.stride(2) == 1:  # heads of a qkv view, normalised without a copy
            outer, inner, far, near = x.shape[0], x.shape[1], x.stride(0), x.stride(1)
        elif x.dim() == 2 and x.stride(1) == 1:
            outer, inner, far, near = x.shape[0], 1, x.stride(0), 0
        else:
            x = x.contiguous()
            outer, inner, far, near = x.numel() // C, 1, C, 0
        y = torch.empty(x.shape)
        self._lib.ft_rms_norm(x.data_ptr(), weight.data_ptr(), outer, inner, far, near, C, eps, y.data_ptr())
        return y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if any(t is not None and t.dtype is not torch.float32 for t in (x, weight, bias)):
            return super().layer_norm(x, weight, bias, eps)
        x, C = x.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        bias_ptr = None if bias is None else bias.data_ptr()
        self._lib.ft_layer_norm(x.data_ptr(), weight.data_ptr(), bias_ptr, x.numel() // C, C, C, eps, y.data_ptr())
        return y

    def activate(self, x: Tensor, kind: Activation) -> Tensor:
        if x.dtype is not torch.float32:
            return super().activate(x, kind)
        x, C = x.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        self._lib.ft_activate(x.data_ptr(), None, x.numel() // C, C, C, ACTIVATIONS[kind], y.data_ptr())
        return y

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        if gate_up.dtype is not torch.float32:
            return super().gated_activation(gate_up, kind)
        if gate_up.stride(1) != 1:
            gate_up = gate_up.contiguous()
        rows, F = gate_up.shape[0], gate_up.shape[1] // 2
        y, gate = torch.empty(rows, F), gate_up.data_ptr()
        self._lib.ft_activate(gate, gate + 4 * F, rows, F, gate_up.stride(0), ACTIVATIONS[kind], y.data_ptr())
        return y

    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        if x.dtype is not torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
            return super().rope_(x, cos, sin)
        tokens, heads = x.shape[0], x.shape[1]
        self._lib.ft_rope(
            x.data_ptr(), tokens, heads, x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        )
        return None

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, context: BatchContext) -> None:
        if k.dtype is not torch.float32 or v.dtype is not torch.float32:
            return super().write_kv(k, v, kv, context)
        if context is not self._checked:
            self._check(context)
        M, G, D = k.shape
        assert kv.k.is_contiguous()
        assert kv.v.is_contiguous()
        self._lib.ft_write_kv(
            k.data_ptr(), v.data_ptr(), *k.stride()[:2], *v.stride()[:2], M, G, D,
            context.groups[kv.group].slots.data_ptr(), context.block_size,
            kv.k.data_ptr(), kv.v.data_ptr(), FORMATS[kv.k.dtype],
        )  # fmt: skip
        return None

    def _check(self, context: BatchContext) -> None:
        """Addresses carry no types: a context of other integers must not be read as these."""
        tables = [group.block_tables for group in context.groups]
        assert all(t.dtype is torch.int32 and t.stride(1) == 1 for t in tables)
        assert all(t.dtype is torch.int32 and t.stride(0) == 1 for t in (context.query_starts, context.kv_lens))
        assert all(g.slots.dtype is torch.int64 and g.slots.stride(0) == 1 for g in context.groups)
        self._checked = context

    def attention(self, q: Tensor, kv: KVLayer, context: BatchContext, scale: float, window: int | None) -> Tensor:
        if q.dtype is not torch.float32:
            return super().attention(q, kv, context, scale, window)
        if context is not self._checked:
            self._check(context)
        M, H, D = q.shape
        tables = context.groups[kv.group].block_tables
        out = torch.empty(M, H * D)
        self._lib.ft_attention(
            q.data_ptr(), q.stride(0), q.stride(1), kv.k.data_ptr(), kv.v.data_ptr(),
            tables.data_ptr(), tables.stride(0), context.query_starts.data_ptr(), context.kv_lens.data_ptr(),
            tables.shape[0], H, kv.k.shape[1], D, context.block_size, window or 0, scale,
            out.data_ptr(), FORMATS[kv.k.dtype],
        )  # fmt: skip
        return out
