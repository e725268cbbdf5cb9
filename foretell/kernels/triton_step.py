"""The step's ends on the GPU: staged words → static buffers before the model, logits → likeliest tokens after it.

Launch shapes follow from numbers the CPU knows, so both can be part of a CUDA graph. Offsets are never
specialised on: another batch composition is not another compilation.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from foretell.worker.step_buffers import StepBuffers, StepLayout

TOKENS = 256  # per program
COLUMNS = 1024  # of a block table, per program
LOGITS = 4096  # per program


@triton.jit(do_not_specialize=["slots_at", "starts_at", "query_at", "first_at", "new_starts_at", "new_at", "width"])
def _unpack_sequence(
    words, resident, tables, kv_lens,
    slots_at, starts_at, query_at, first_at, new_starts_at, new_at, width, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one sequence's table: new block ids go into the resident one, all go into the batch's."""
    s = tl.program_id(0).to(tl.int64)
    slot = tl.load(words + slots_at + s).to(tl.int64)
    begin, end = tl.load(words + query_at + s), tl.load(words + query_at + s + 1)
    if tl.program_id(1) == 0:
        tl.store(kv_lens + s, tl.load(words + starts_at + s) + end - begin)
    held = tl.load(words + first_at + s)
    new_begin, new_end = tl.load(words + new_starts_at + s), tl.load(words + new_starts_at + s + 1)
    total = tl.minimum(tl.maximum(held + new_end - new_begin, 1), width)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, is_new = c < total, (c >= held) & (new_end > new_begin)
    # a row that only pads has nothing held and nothing new: its first block is the resident one too
    old = tl.load(resident + slot * width + c, mask=inside & ~is_new, other=0)
    new = tl.load(words + new_at + new_begin + c - held, mask=inside & is_new, other=0)
    block = tl.where(is_new, new, old)
    tl.store(tables + s * width + c, block, mask=inside)
    tl.store(resident + slot * width + c, block, mask=inside & is_new)


@triton.jit(do_not_specialize=["slots_at", "starts_at", "query_at", "tokens_at", "width"])
def _unpack_tokens(
    words, tables, last_token, token_ids, positions, kv_slots,
    slots_at, starts_at, query_at, tokens_at, width,
    vocab, BLOCK_SIZE: tl.constexpr, FIRST_GROUP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence: id, position, and the slot their key and value go to."""
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(words + query_at + s), tl.load(words + query_at + s + 1)
    i = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = i < end - begin
    at = begin + i
    position = tl.load(words + starts_at + s) + i
    block = tl.load(tables + s * width + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    tl.store(kv_slots + at, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    if FIRST_GROUP:
        slot = tl.load(words + slots_at + s)
        token = tl.load(words + tokens_at + at, mask=inside, other=0).to(tl.int64)
        token = tl.where(token < 0, tl.load(last_token + slot), token)
        token = tl.minimum(tl.maximum(token, 0), vocab - 1)
        tl.store(token_ids + at, token, mask=inside)
        tl.store(positions + at, position.to(tl.int64), mask=inside)


def unpack_triton(
    buffers: StepBuffers, layout: StepLayout, max_query_len: int, num_new: Sequence[int] | None
) -> None:
    """As ``unpack_torch``, in two launches per KV group."""
    s, width = layout.num_seqs, buffers.max_blocks
    tiles, columns = triton.cdiv(max_query_len, TOKENS), triton.cdiv(width, COLUMNS)
    tokens = TOKENS if max_query_len > 1 else 1
    slots_at, starts_at, query_at = layout.slots.start, layout.starts.start, layout.query_starts.start
    for group, resident in enumerate(buffers.resident):
        _unpack_sequence[(s, columns)](
            buffers.staging, resident, buffers.tables[group], buffers.kv_lens,
            slots_at, starts_at, query_at, layout.first_new[group].start, layout.new_starts[group].start,
            layout.new_blocks, width, COLUMNS=COLUMNS,
        )  # fmt: skip
        _unpack_tokens[(s, tiles)](
            buffers.staging, buffers.tables[group], buffers.last_token, buffers.token_ids, buffers.positions,
            buffers.kv_slots[group], slots_at, starts_at, query_at, layout.tokens.start, width,
            buffers.vocab_size, BLOCK_SIZE=buffers.block_size, FIRST_GROUP=group == 0, TOKENS=tokens,
        )  # fmt: skip


@triton.jit
def _likeliest_of_part(logits, best, where, vocab, stride, parts, LOGITS: tl.constexpr):
    """Maximum and its first place in one part of a row; NaN counts as greater than anything."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * LOGITS + tl.arange(0, LOGITS)
    x = tl.load(logits + row * stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    most = tl.max(x, axis=0)
    tl.store(best + row * parts + part, most)
    tl.store(where + row * parts + part, tl.min(tl.where(x == most, at, 2147483647), axis=0))


@triton.jit
def _likeliest_of_row(best, where, words, sampled, last_token, parts, slots_at, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    x = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    at = tl.load(where + row * parts + part, mask=part < parts, other=2147483647)
    most = tl.max(x, axis=0)
    token = tl.min(tl.where(x == most, at, 2147483647), axis=0)
    finite = (most < float("inf")) & (most > float("-inf"))
    token = tl.where(finite, token, -1).to(tl.int64)
    tl.store(sampled + row, token)
    tl.store(last_token + tl.load(words + slots_at + row), token)


def greedy_triton(buffers: StepBuffers, layout: StepLayout, logits: Tensor) -> None:
    """Likeliest tokens into ``sampled`` and ``last_token``; -1 for a row that is not finite."""
    rows, vocab = logits.shape
    parts = triton.cdiv(vocab, LOGITS)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    where = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    _likeliest_of_part[(rows, parts)](logits, best, where, vocab, logits.stride(0), parts, LOGITS=LOGITS)
    _likeliest_of_row[(rows,)](
        best, where, buffers.staging, buffers.sampled, buffers.last_token, parts, layout.slots.start,
        PARTS=triton.next_power_of_2(parts),
    )  # fmt: skip
