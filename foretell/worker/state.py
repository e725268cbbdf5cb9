"""What a worker keeps of each request: its tokens, its block tables, and what sampling has to remember."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foretell.core.messages import Added, TokenLogprobs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class RequestState:
    """Rebuilt from an ``Added`` after a preemption: nothing here cannot be derived from the tokens."""

    def __init__(self, added: Added, num_groups: int) -> None:
        self.id = added.request_id
        self.params = added.params
        self.prompt_len = len(added.prompt_token_ids)
        known = [*added.prompt_token_ids, *added.output_token_ids]
        self.num_tokens = len(known)
        self.tokens: NDArray[np.int64] = np.empty(max(64, 2 * len(known)), dtype=np.int64)
        self.tokens[: len(known)] = known
        self.tables: list[NDArray[np.int32]] = [np.zeros(8, dtype=np.int32) for _ in range(num_groups)]
        self.num_blocks = [0] * num_groups
        # prompt log-probabilities gathered so far, one per prompt token from the second on
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs_due = self.params.prompt_logprobs is not None and not added.output_token_ids
        self.counts: Tensor | None = None  # [vocab] int32 output-token counts, kept only for penalties
        self.prompt_seen: Tensor | None = None  # [vocab] bool

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def output_ids(self) -> NDArray[np.int64]:
        return self.tokens[self.prompt_len : self.num_tokens]

    def append(self, token_id: int) -> None:
        if self.num_tokens == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        if self.counts is not None:
            self.counts[token_id] += 1

    def add_blocks(self, group: int, block_ids: tuple[int, ...]) -> None:
        """Append to a group's block table; dropped blocks (-1) are never read, any valid id will do."""
        have, need = self.num_blocks[group], self.num_blocks[group] + len(block_ids)
        table = self.tables[group]
        if need > len(table):
            table = np.concatenate([table, np.zeros(max(need, len(table)), dtype=np.int32)])
            self.tables[group] = table
        table[have:need] = [max(0, b) for b in block_ids]
        self.num_blocks[group] = need
