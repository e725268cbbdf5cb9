"""The kernel interface: what the model asks of a device, as plain functions on tensors.

Backends: ``reference`` (torch, any device, the oracle of the others), ``cpu`` (C++, built at first use).
Shapes: M tokens of all sequences in the batch laid end to end, H query heads, G KV heads, D head_dim,
S sequences. Activations are float32 on the CPU whatever dtype weights and KV cache have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from foretell.config import Activation, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True)
class KVGroupView:
    """One KV group's addressing for this batch."""

    block_tables: Tensor  # [S, max_blocks] int32: physical block of each logical one; dropped ones are stale
    slots: Tensor  # [M] int64: block · block_size + offset, where each token's K/V goes


@dataclass(slots=True)
class BatchContext:
    """What attention needs to know of the batch. Sequence s owns tokens query_starts[s]:query_starts[s+1]."""

    positions: Tensor  # [M] int64
    query_starts: Tensor  # [S+1] int32
    kv_lens: Tensor  # [S] int32: keys visible to the sequence's last token, this chunk included
    groups: tuple[KVGroupView, ...]
    block_size: int
    max_query_len: int
    max_kv_len: int
    chunks: Sequence[tuple[int, int]] = ()  # (first position, tokens) of each sequence, where the host tells
    last_rows: Tensor | None = None  # [S] each sequence's last token, in a layer whose other rows nobody reads


@dataclass(slots=True)
class KVLayer:
    """One layer's share of the paged KV cache."""

    k: Tensor  # [num_blocks, G, block_size, D]
    v: Tensor  # [num_blocks, G, block_size, D]
    group: int  # index into BatchContext.groups


@dataclass(slots=True)
class HeadNorms:
    """RMS norms of every query and of every key head, applied before they are rotated (Qwen 3, Gemma 3)."""

    q: Tensor  # [D] float32
    k: Tensor  # [D] float32
    eps: float


class Linear(Protocol):
    """A weight [N, K] in a backend's own layout (packed, quantised, sharded …), applied as x · Wᵀ + b."""

    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes as it is kept."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] → [M, N], in x's dtype."""
        ...


@runtime_checkable
class WritesInto(Protocol):
    """A linear layer that puts its result where it is told to."""

    def into(self, x: Tensor, out: Tensor) -> None:
        """x [M, K] → out [M, N], contiguous, in x's dtype."""
        ...


class Kernels(Protocol):
    """One backend. Functions return new tensors unless their name ends in an underscore."""

    name: str
    defers_sums: bool  # add_rms_norm is one kernel: worth keeping the sum for

    def set_threads(self, count: int) -> None:
        """Threads that a call of this backend may use; results do not depend on it."""
        ...

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
        """Begin whatever the model's kernels need before their first use; the result waits for it."""
        ...

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """weight [N, K] in the dtype it shall be kept in; the result owns a copy in the best layout."""
        ...

    def pack_quantised(self, raw: Tensor, quant_type: str, bias: Tensor | None) -> Linear | None:
        """A linear layer that keeps GGUF blocks ``raw`` [N, bytes per row] uint8 of this type ("Q4_1", …) in as
        many bits as they came with; None where the backend cannot, and the caller dequantises."""
        ...

    def quantise_linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear | None:
        """A linear layer that keeps weight [N, K] in the format of this name ("int8", "int4", "fp8"), rounded here;
        None where the backend has none such."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x/√(mean(x²)+eps) · weight over the last dimension (Zhang & Sennrich 2019); x [..., C]."""
        ...

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, y_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + y), x + y), of [M, C]: what stands between two halves of a block. With ``y_weight``, y is
        normed by itself first."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...

    def activate(self, x: Tensor, kind: Activation) -> Tensor: ...

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """[M, 2F] (gate | up) → act(gate) · up, [M, F]."""
        ...

    def gated_linear(self, linear: Linear, x: Tensor, kind: Activation) -> Tensor:
        """x [M, K] through a layer of [gate; up] rows [2F, K], then gated_activation: [M, F]."""
        ...

    def rope_(self, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotate the first 2·R dims of each head in place, halves paired (x[i], x[i+R]).

        x [M, heads, D] (may be a strided view of qkv; last dim contiguous), cos/sin [M, R] float32.
        """
        ...

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, context: BatchContext) -> None:
        """Store k, v [M, G, D] (strided views allowed) at the context's slots, in the cache's dtype."""
        ...

    def attention(self, q: Tensor, kv: KVLayer, context: BatchContext, scale: float, window: int | None) -> Tensor:
        """Causal softmax(scale · Q·Kᵀ)·V over the paged cache; q [M, H, D] → [M, H·D].

        Token at position p of its sequence sees keys j with j ≤ p and, with a window, j > p - window.
        Query head h reads KV head h // (H / G).
        """
        ...

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
        """All between the projection of q, k, v and that of the result, [M, H·D]: norm the heads of q and k, rotate
        them (rope_), keep k and v (write_kv), attention. q [M, H, D], k and v [M, G, D] may be overwritten.

        With ``context.last_rows``, all of k and v are kept, but only those rows are the result, [S, H·D]."""
        ...


def torch_dtype(name: str) -> torch.dtype:
    """'float32' → torch.float32 and so on, for the dtypes weights may have."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
