"""A paged KV cache and the batch contexts over it, made as plainly as possible: what a worker does, for tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from foretell.kernels.base import BatchContext, KVGroupView, KVLayer
from foretell.model.transformer import Transformer


class PagedRunner:
    """Runs sequences through a transformer; every KV group has shuffled block ids of its own."""

    def __init__(
        self, model: Transformer, *, max_tokens: int = 512, sequences: int = 1, block_size: int = 4, seed: int = 0
    ) -> None:
        spec = model.spec
        self.model, self.block_size = model, block_size
        self.lengths = [0] * sequences
        blocks_each = -(-max_tokens // block_size)
        count = blocks_each * sequences
        rng = random.Random(seed)
        self.tables: list[Tensor] = []
        for _ in spec.kv_groups:
            ids = list(range(count))
            rng.shuffle(ids)
            self.tables.append(torch.tensor(ids, dtype=torch.int32).view(sequences, blocks_each))
        # NaN in slots never written: nothing may read them
        shape = (count, spec.num_kv_heads, block_size, spec.head_dim)
        group_of = {layer: g for g, group in enumerate(spec.kv_groups) for layer in group.layers}
        self.kv = [
            KVLayer(torch.full(shape, float("nan")), torch.full(shape, float("nan")), group_of[layer])
            for layer in range(spec.num_layers)
        ]

    def context(self, chunk_lengths: list[int]) -> BatchContext:
        """The next chunk_lengths[s] tokens of each sequence (0: the sequence sits this step out)."""
        active = [s for s, n in enumerate(chunk_lengths) if n]
        positions = [torch.arange(self.lengths[s], self.lengths[s] + chunk_lengths[s]) for s in active]
        groups = []
        for table in self.tables:
            slots = [
                table[s].long()[p // self.block_size] * self.block_size + p % self.block_size
                for s, p in zip(active, positions, strict=True)
            ]
            groups.append(KVGroupView(table[active], torch.cat(slots)))
        starts = torch.tensor([0, *(chunk_lengths[s] for s in active)]).cumsum(0).to(torch.int32)
        kv_lens = [self.lengths[s] + chunk_lengths[s] for s in active]
        return BatchContext(
            positions=torch.cat(positions),
            query_starts=starts,
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
            groups=tuple(groups),
            block_size=self.block_size,
            max_query_len=max(chunk_lengths),
            max_kv_len=max(kv_lens),
        )

    def step(self, chunks: list[list[int]]) -> Tensor:
        """Feeds each sequence its next tokens; logits of all of them, laid end to end [M, vocab]."""
        lengths = [len(chunk) for chunk in chunks]
        tokens = torch.tensor([token for chunk in chunks for token in chunk])
        hidden = self.model.forward(tokens, self.context(lengths), self.kv)
        self.lengths = [old + new for old, new in zip(self.lengths, lengths, strict=True)]
        return self.model.logits(hidden)


@contextmanager
def one_thread() -> Iterator[None]:
    """For small models, and for machines that others use too: threads that spin for a busy core cost minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prompt_logits(model: Transformer, prompt: list[int], chunk: int = 0, **options: int) -> Tensor:
    """Logits [len(prompt), vocab], the prompt fed in chunks (0: at once)."""
    runner = PagedRunner(model, max_tokens=len(prompt), **options)
    size = chunk or len(prompt)
    return torch.cat([runner.step([prompt[i : i + size]]) for i in range(0, len(prompt), size)])


def greedy(model: Transformer, prompt: list[int], steps: int, **options: int) -> tuple[list[int], Tensor]:
    """Prefill, then decode token by token: the tokens and the logits [steps, vocab] each was taken from."""
    runner = PagedRunner(model, max_tokens=len(prompt) + steps, **options)
    logits = runner.step([prompt])[-1]
    tokens, rows = [int(logits.argmax())], [logits]
    while len(tokens) < steps:
        logits = runner.step([[tokens[-1]]])[-1]
        tokens.append(int(logits.argmax()))
        rows.append(logits)
    return tokens, torch.stack(rows)
