"""A step's words: which tokens, positions, slots and new blocks its chunks are, as one block that is copied at once.

Chunks and what is known of their requests go in; foretell.worker.step_buffers says where each array lies and unpacks
them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from foretell.core.messages import Chunk
from foretell.worker.state import RequestState
from foretell.worker.step_buffers import StepBuffers, StepLayout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class StepWords:
    """Fills the pinned blocks of ``buffers``. ``slots``: a request's row of the resident tables, kept by others."""

    def __init__(self, buffers: StepBuffers, slots: dict[int, int]) -> None:
        self.buffers = buffers
        self.slots = slots

    def send_padding(self, layout: StepLayout) -> None:
        """A step of nobody's tokens, as many for each sequence, in the block that is set aside for them."""
        words = self.buffers.staging_host[0].numpy()
        words[: layout.new_blocks] = 0
        words[layout.slots] = self.buffers.spare_slot
        length = layout.num_tokens // layout.num_seqs
        words[layout.query_starts] = range(0, layout.num_tokens + 1, length)
        blocks = -(-length // self.buffers.block_size)
        for first in layout.first_new:
            words[first] = blocks
        self.buffers.send(0, layout.new_blocks)

    def send(self, layout: StepLayout, chunks: list[Chunk], states: list[RequestState], ring: int) -> Sequence[int]:
        """Fill this step's block of words and copy it; new blocks per group."""
        words = self.buffers.staging_host[ring].numpy()
        spare = [self.buffers.spare_slot] * (layout.num_seqs - len(chunks))
        words[layout.slots] = [self.slots[chunk.request_id] for chunk in chunks] + spare
        words[layout.starts] = [chunk.start for chunk in chunks] + [0] * len(spare)
        tokens, lengths = words[layout.tokens], [chunk.length for chunk in chunks]
        if layout.num_tokens == layout.num_seqs:
            known = [
                state.tokens[chunk.start] if chunk.start < state.num_tokens else -1
                for chunk, state in zip(chunks, states, strict=True)
            ]
            tokens[:] = known + [0] * len(spare)
            words[layout.query_starts] = range(layout.num_seqs + 1)
        else:
            self._fill_tokens(tokens, chunks, states)
            words[layout.query_starts] = [0, *accumulate(lengths)]
        return self._send_blocks(layout, chunks, states, ring)

    @staticmethod
    def _fill_tokens(tokens: NDArray[np.int32], chunks: list[Chunk], states: list[RequestState]) -> None:
        at = 0
        for chunk, state in zip(chunks, states, strict=True):
            length, start = chunk.length, chunk.start
            if length == 1:
                tokens[at] = state.tokens[start] if start < state.num_tokens else -1
            else:
                tokens[at : at + length] = state.tokens[start : start + length]
            at += length

    def _send_blocks(
        self, layout: StepLayout, chunks: list[Chunk], states: list[RequestState], ring: int
    ) -> Sequence[int]:
        """New block ids, all of one group after the other, then the copy of everything."""
        words = self.buffers.staging_host[ring].numpy()
        pad = [0] * (layout.num_seqs - len(chunks))
        at, num_new = 0, []
        for group in range(len(self.buffers.resident)):
            words[layout.first_new[group]] = [state.num_blocks[group] for state in states] + pad
            counts, before = [0] * (layout.num_seqs + 1), at
            for row, chunk in enumerate(chunks):
                new = chunk.new_block_ids[group]
                if new:
                    counts[row + 1] = self._put_blocks(words, layout.new_blocks + at, group, states[row], new)
                    at += counts[row + 1]
            counts[0] = before
            words[layout.new_starts[group]] = list(accumulate(counts)) if at > before else [before] * len(counts)
            num_new.append(at - before)
        self.buffers.send(ring, layout.new_blocks + at)
        return num_new

    def _put_blocks(
        self, words: NDArray[np.int32], at: int, group: int, state: RequestState, new: Sequence[int]
    ) -> int:
        """Ids that travel with the step; dropped blocks (-1) are never read, any valid id will do."""
        ids = [block if block > 0 else 0 for block in new]
        held = state.num_blocks[group]
        state.num_blocks[group] = held + len(new)
        if at + len(new) > len(words):  # a very long prefix hit goes ahead of the step, on its own
            self._write_table(group, self.slots[state.id], held, ids)
            return 0
        words[at : at + len(new)] = ids
        return len(new)

    def _write_table(self, group: int, slot: int, first: int, blocks: Sequence[int]) -> None:
        ids = torch.tensor(blocks, dtype=torch.int32)
        self.buffers.resident[group][slot, first : first + len(blocks)] = ids.to(self.buffers.device)
