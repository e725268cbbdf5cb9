"""What a step needs on the device, in buffers that never move: CUDA graphs read them by address.

One step travels as one pinned block of int32 words (``StepLayout``), one copy, unpacked on the device into token
ids, positions, KV slots and block tables. Block tables stay on the device by request *slot*: only new block ids
travel. The last sampled token of each slot stays there too, so the next step need not wait for the CPU to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor

from foretell.config import SchedulerConfig
from foretell.kernels.base import BatchContext, KVGroupView

INLINE_BLOCKS = 16384  # new block ids beyond a step's own that can travel with it (prefix-cache hits)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the arrays of a step of S sequences and M tokens lie, in words from the beginning."""

    num_seqs: int
    num_tokens: int
    slots: slice  # [S] the request's row in the resident tables
    starts: slice  # [S] position of the chunk's first token
    query_starts: slice  # [S+1]
    first_new: tuple[slice, ...]  # per KV group [S]: logical index of the first new block
    new_starts: tuple[slice, ...]  # per KV group [S+1]: where its ids begin among all new blocks
    tokens: slice  # [M] ids; -1: the last one sampled for that slot
    new_blocks: int  # ids of new blocks, all groups, from here on


@lru_cache(maxsize=4096)
def step_layout(num_seqs: int, num_tokens: int, num_groups: int) -> StepLayout:
    at = 0

    def take(count: int) -> slice:
        nonlocal at
        at += count
        return slice(at - count, at)

    slots, starts, query_starts = take(num_seqs), take(num_seqs), take(num_seqs + 1)
    first_new = tuple(take(num_seqs) for _ in range(num_groups))
    new_starts = tuple(take(num_seqs + 1) for _ in range(num_groups))
    tokens = take(num_tokens)
    return StepLayout(num_seqs, num_tokens, slots, starts, query_starts, first_new, new_starts, tokens, at)


class StepBuffers:
    """Static tensors for up to ``max_num_seqs`` sequences and ``max_num_batched_tokens`` tokens per step.

    The last row of the resident tables belongs to nobody: rows that only pad a graph read and write the KV block
    that is set aside for them, ``spare_blocks[group]``.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        spare_blocks: tuple[int, ...],
        vocab_size: int,
        device: torch.device,
        *,
        in_flight: int,
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = device
        self.block_size = config.block_size
        self.max_seqs = config.max_num_seqs
        self.max_tokens = max(config.max_num_batched_tokens, self.max_seqs)
        self.max_blocks = ceil(config.max_model_len / config.block_size)
        self.vocab_size = vocab_size
        self.spare_slot = self.max_seqs
        groups = len(spare_blocks)
        largest = step_layout(self.max_seqs, self.max_tokens, groups)
        own_blocks = groups * (self.max_tokens // self.block_size + 2 * self.max_seqs)
        words = largest.new_blocks + own_blocks + INLINE_BLOCKS
        self.words = words
        pinned = device.type == "cuda"

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.staging = empty(words)
        self.staging_host = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(in_flight)]
        self.token_ids = empty(self.max_tokens, dtype=torch.int64)
        self.positions = empty(self.max_tokens, dtype=torch.int64)
        self.kv_lens = empty(self.max_seqs)
        self.kv_slots = [empty(self.max_tokens, dtype=torch.int64) for _ in range(groups)]
        self.tables = [empty(self.max_seqs, self.max_blocks) for _ in range(groups)]
        self.resident = [empty(self.max_seqs + 1, self.max_blocks) for _ in range(groups)]
        for table, block in zip(self.resident, spare_blocks, strict=True):
            table[self.spare_slot] = block
        self.last_token = empty(self.max_seqs + 1, dtype=torch.int64)
        self.logits = empty(self.max_seqs, vocab_size, dtype=logits_dtype)
        self.sampled = empty(self.max_seqs, dtype=torch.int64)
        self.sampled_host = [
            torch.zeros(self.max_seqs, dtype=torch.int64, pin_memory=pinned) for _ in range(in_flight)
        ]

    @property
    def nbytes(self) -> int:
        """Device memory of all of them."""
        single = (
            self.staging,
            self.token_ids,
            self.positions,
            self.kv_lens,
            self.last_token,
            self.logits,
            self.sampled,
        )
        return sum(t.nbytes for t in (*single, *self.kv_slots, *self.tables, *self.resident))

    def send(self, ring: int, num_words: int) -> None:
        """Copy a filled block to the device; the next step's may be filled meanwhile, in another of the ring."""
        self.staging[:num_words].copy_(self.staging_host[ring][:num_words], non_blocking=True)

    def context(self, layout: StepLayout, max_query_len: int, max_kv_len: int) -> BatchContext:
        """Views of the static buffers as the kernels see the batch."""
        s, m = layout.num_seqs, layout.num_tokens
        groups = tuple(
            KVGroupView(table[:s], slots[:m]) for table, slots in zip(self.tables, self.kv_slots, strict=True)
        )
        return BatchContext(
            positions=self.positions[:m],
            query_starts=self.staging[layout.query_starts],
            kv_lens=self.kv_lens[:s],
            groups=groups,
            block_size=self.block_size,
            max_query_len=max_query_len,
            max_kv_len=max_kv_len,
        )


def unpack_torch(buffers: StepBuffers, layout: StepLayout, max_query_len: int, num_new: Sequence[int] | None) -> None:
    """Staged words → static buffers, in plain torch; ``num_new[group]`` new blocks. Does not wait for the device
    unless it has to ask it for those counts (None)."""
    words, s, m = buffers.staging, layout.num_seqs, layout.num_tokens
    device, size = buffers.device, buffers.block_size
    slots, starts = words[layout.slots].long(), words[layout.starts].long()
    query_starts = words[layout.query_starts].long()
    lengths = query_starts.diff()
    seq = torch.repeat_interleave(torch.arange(s, device=device), lengths, output_size=m)
    positions = starts[seq] + torch.arange(m, device=device) - query_starts[seq]
    buffers.positions[:m] = positions
    buffers.kv_lens[:s] = starts + lengths
    tokens = words[layout.tokens].long()
    tokens = torch.where(tokens >= 0, tokens, buffers.last_token[slots[seq]])
    # a row whose logits were not finite has -1 for a token: it has ended, and its last step may not harm others
    buffers.token_ids[:m] = tokens.clamp(0, buffers.vocab_size - 1)
    for group, resident in enumerate(buffers.resident):
        new_starts = words[layout.new_starts[group]].long()
        count = int(new_starts[-1] - new_starts[0]) if num_new is None else num_new[group]
        if count:
            rows = torch.repeat_interleave(torch.arange(s, device=device), new_starts.diff(), output_size=count)
            at = new_starts[:1] + torch.arange(count, device=device)
            columns = words[layout.first_new[group]].long()[rows] + at - new_starts[rows]
            resident[slots[rows], columns] = words[layout.new_blocks + at]
        table = resident[slots]
        buffers.tables[group][:s] = table
        buffers.kv_slots[group][:m] = table[seq, positions // size].long() * size + positions % size
