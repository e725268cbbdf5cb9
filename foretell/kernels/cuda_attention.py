"""Attention on a GPU: which kernel takes which sequences of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.kernels import cuda_tuning, triton_elementwise, triton_prefill
from foretell.kernels.base import BatchContext, HeadNorms, KVGroupView, KVLayer
from foretell.kernels.cuda_decode import decode, norm_arguments
from foretell.kernels.cuda_dense import DENSE_FROM, STEP, can_be_dense, dense_attention
from foretell.kernels.cuda_linear import precision
from foretell.kernels.cuda_tuning import power_of_two
from foretell.kernels.reference import ReferenceKernels
from foretell.kernels.triton_common import (
    Scratch,
    has_dependent_launch,
    launch,
    set_descriptor_memory,
    shared_bytes,
)

NO_WINDOW = 1 << 30  # tokens


class CudaAttention(ReferenceKernels):
    """Sequences with one new token, at the beginning of the batch, are decoded; the others take a prefill kernel."""

    def __init__(self, batch_invariant: bool = False) -> None:
        super().__init__()
        self.batch_invariant = batch_invariant
        self.scratch = Scratch()
        self._last: tuple[BatchContext, int, BatchContext, BatchContext | None] | None = None

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
        qkv, H = _one_row_per_token(q, k, v), q.shape[1]
        if context.last_rows is not None and not self.batch_invariant:
            self._place(qkv, H, norms, rotation, kv, context)
            return self._decode(qkv.index_select(0, context.last_rows), H, None, None, kv, context, scale, window)
        mixed = self._attend(qkv, H, norms, rotation, kv, context, scale, window)
        return mixed if context.last_rows is None else mixed.index_select(0, context.last_rows)

    def _attend(
        self,
        qkv: Tensor,
        H: int,
        norms: HeadNorms | None,
        rotation: tuple[Tensor, Tensor] | None,
        kv: KVLayer,
        context: BatchContext,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Of rows [M, (H + 2G)·D], one per token."""
        ones, decoding, rest = self._parts_of(context, len(qkv))
        if rest is None:
            return self._decode(qkv, H, norms, rotation, kv, decoding, scale, window)
        out = torch.empty(len(qkv), H * kv.k.shape[3], dtype=qkv.dtype, device=qkv.device)
        if ones:
            angles = None if rotation is None else (rotation[0][:ones], rotation[1][:ones])
            self._decode(qkv[:ones], H, norms, angles, kv, decoding, scale, window, out)
        angles = None if rotation is None else (rotation[0][ones:], rotation[1][ones:])
        self._place(qkv[ones:], H, norms, angles, kv, rest)
        return self._prefill(qkv, H, kv, rest, scale, window, out, ones)

    def _parts_of(self, context: BatchContext, rows: int) -> tuple[int, BatchContext, BatchContext | None]:
        """How many sequences at the beginning have one new token each, these as a batch of their own, and the others
        (None: there are none), whose rows keep their numbers. Remembered: the next layer asks the same."""
        if self._last is None or self._last[0] is not context:
            sequences = context.kv_lens.shape[0]
            ones = sequences if context.max_query_len == 1 and rows == sequences else _leading_ones(context.chunks)
            ones = 0 if self.batch_invariant else ones
            whole = ones == sequences and rows == sequences
            first = context if whole or not ones else _sliced(context, slice(0, ones), 1)
            rest = None if whole else context
            if ones and not whole:
                rest = _sliced(context, slice(ones, sequences), context.max_query_len)
            self._last = (context, ones, first, rest)
        return self._last[1:]

    def _prefill(
        self,
        qkv: Tensor,
        H: int,
        kv: KVLayer,
        context: BatchContext,
        scale: float,
        window: int | None,
        out: Tensor,
        first_row: int,
    ) -> Tensor:
        """Attention of sequences whose rows begin at ``first_row``, into ``out``: long chunks with nothing before
        them by the library's kernel, or where a window forbids that by one that reads no cache, others by ours over
        the cache."""
        (_, G, _, D), M = kv.k.shape, len(qkv)
        q, k, v = torch.split(qkv.view(M, H + 2 * G, D), [H, G, G], dim=1)
        whole = [n if first == 0 else 0 for first, n in context.chunks]  # tokens of chunks with nothing before them
        long = [n >= DENSE_FROM for n in whole]
        plain = self.batch_invariant or q.element_size() != 2
        too_long = window is not None and bool(whole) and window < max(whole)
        if too_long and all(whole) and not plain and power_of_two(D) == D and has_dependent_launch(q.device):
            self._fresh(q, k, v, context, scale, window, out)
            return out
        if plain or too_long or not any(long) or not can_be_dense(D):
            self._paged(q, kv, context, scale, window, out, 0)
            return out
        if first_row == 0 and all(long) and len({*whole}) == 1 and (len(long) == 1 or whole[0] % STEP == 0):
            return dense_attention(q, k, v, whole[0], scale)
        if not all(long):
            self._paged(q, kv, context, scale, window, out, DENSE_FROM)
        at = first_row
        for (_, n), own in zip(context.chunks, long, strict=True):
            if own:
                part = slice(at, at + n)
                out[part] = dense_attention(q[part], k[part], v[part], n, scale)
            at += n
        return out

    def _decode(
        self,
        qkv: Tensor,
        H: int,
        norms: HeadNorms | None,
        rotation: tuple[Tensor, Tensor] | None,
        kv: KVLayer,
        context: BatchContext,
        scale: float,
        window: int | None,
        out: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            out = torch.empty(len(qkv), H * kv.k.shape[3], dtype=qkv.dtype, device=qkv.device)
        decode(qkv, H, norms, rotation, kv, context, scale, window, out, self.scratch)
        return out

    def _place(
        self,
        qkv: Tensor,
        H: int,
        norms: HeadNorms | None,
        rotation: tuple[Tensor, Tensor] | None,
        kv: KVLayer,
        context: BatchContext,
    ) -> None:
        """Norm and rotate q and k in place; keep k and v."""
        M, (_, G, block_size, D) = len(qkv), kv.k.shape
        cos, sin = rotation if rotation is not None else (qkv, qkv)
        R = cos.shape[1] if rotation is not None else 0
        heads, warps = (16, 4) if norms is None else (16, 2) if D <= 128 else (8, 4)
        heads = min(power_of_two(H + 2 * G), heads)
        launch(
            triton_elementwise.place_heads, (M, -(-(H + 2 * G) // heads)),
            qkv, qkv.stride(0), cos, sin, *norm_arguments(norms, qkv), kv.k, kv.v, context.groups[kv.group].slots,
            H, G, block_size, D, R, power_of_two(max(D - 2 * R, 1)), power_of_two(max(R, 1)), heads,
            norms is not None, num_warps=warps, device=qkv.device,
        )  # fmt: skip

    def attention(self, q: Tensor, kv: KVLayer, context: BatchContext, scale: float, window: int | None) -> Tensor:
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        self._paged(q, kv, context, scale, window, out, 0)
        return out

    def _paged(
        self,
        q: Tensor,
        kv: KVLayer,
        context: BatchContext,
        scale: float,
        window: int | None,
        out: Tensor,
        skip_from: int,
    ) -> None:
        """Attention over the cache, into ``out``; chunks of ``skip_from`` tokens or more with nothing before them are
        left alone (0: none is)."""
        M, H, D = q.shape
        G, block_size = kv.k.shape[1], kv.k.shape[2]
        if q.stride(2) != 1 or q.stride(1) != D:
            q = q.contiguous()
        how = cuda_tuning.prefill(D, q.element_size(), shared_bytes(q.device))
        share, pack = H // G, 1
        while share % (2 * pack) == 0 and pack < how.block_m // 16:
            pack *= 2
        tables = context.groups[kv.group].block_tables
        # Keys that all rows of a tile see need no mask, but their products round otherwise: invariant rows go one way
        masked = window is not None or self.batch_invariant
        window = NO_WINDOW if masked and window is None else window
        S, rows = tables.shape[0], how.block_m // pack
        tiles = min(M // rows + S, S * -(-context.max_query_len // rows))
        launch(
            triton_prefill.paged_prefill, (tiles, H // pack),
            q, q.stride(0), kv.k, kv.v, tables, tables.stride(0), context.query_starts, context.kv_lens, out,
            scale, window or 0, S, H, G, skip_from, block_size, D, power_of_two(D, 16), share, pack,
            how.block_m, how.block_n, _sequences(S), masked, precision(q), how.stages,
            num_warps=how.num_warps, device=q.device,
        )  # fmt: skip

    def _fresh(
        self, q: Tensor, k: Tensor, v: Tensor, context: BatchContext, scale: float, window: int | None, out: Tensor
    ) -> None:
        """``attention`` where every sequence's chunk is all there is of it so far, placed heads and all: keys and
        values are read where they were made. q [M, H, D], k and v [M, G, D], views of one product."""
        M, H, D = q.shape
        share, S = H // k.shape[1], context.kv_lens.shape[0]
        how = cuda_tuning.fresh(D)
        tiles = min(M // how.block_m + S, S * -(-context.max_query_len // how.block_m))
        set_descriptor_memory(q.device)
        launch(
            triton_prefill.fresh_prefill, (tiles, H),
            q, k, v, q.stride(0), context.query_starts, out, scale, window or 0, M, S, H,
            D, share, how.block_m, how.block_n, _sequences(S), window is not None, how.stages,
            num_warps=how.num_warps, device=q.device,
        )  # fmt: skip


def _leading_ones(chunks: Sequence[tuple[int, int]]) -> int:
    """Sequences before the first that has more than one new token."""
    return next((i for i, (_, n) in enumerate(chunks) if n != 1), len(chunks))


def _sliced(context: BatchContext, part: slice, longest: int) -> BatchContext:
    """Some of the sequences; those before them have one token each, and row numbers stay."""
    groups = tuple(KVGroupView(g.block_tables[part], g.slots[part.start :]) for g in context.groups)
    starts = context.query_starts[part.start : part.stop + 1]
    return BatchContext(
        context.positions[part.start :], starts, context.kv_lens[part], groups, context.block_size,
        longest, context.max_kv_len, context.chunks[part],
    )  # fmt: skip


def _sequences(S: int) -> int:
    """Numbers of sequences that prefill is compiled for: two, not one for every power of 2."""
    return 64 if S <= 64 else power_of_two(S, 1024)


def _one_row_per_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [M, H, D], k and v [M, G, D] as rows [M, (H + 2G)·D]: the product they were split from, or a copy."""
    M, H, D = q.shape
    G = k.shape[1]
    size, row = q.element_size(), q.stride(0)
    ours = all(t.stride(2) == 1 and t.stride(1) == D and t.stride(0) == row for t in (q, k, v))
    if ours and k.data_ptr() - q.data_ptr() == H * D * size and v.data_ptr() - k.data_ptr() == G * D * size:
        return q.as_strided((M, (H + 2 * G) * D), (row, 1))
    return torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), dim=1)
