"""The decoder-only transformer: embed the tokens, run the blocks, norm, project to the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.kernels.base import BatchContext, KVLayer, Linear, WritesInto
from foretell.model.block import Block, SharedNormBlock
from foretell.model.norm import Norm
from foretell.model.residual import Residual, total
from foretell.model.rope import RotaryTable, Rotation
from foretell.store.gguf_rows import QuantisedRows


@dataclass(slots=True)
class Embedding:
    """Token vectors, with learned positions where the family has no rotary ones."""

    tokens: Tensor | QuantisedRows  # [vocab, h]
    positions: Tensor | None  # [learned_positions, h]
    multiplier: float
    dtype: torch.dtype

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids [M], positions [M], int64 → [M, h] in the activation dtype."""
        x = self.tokens[token_ids].to(self.dtype)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        return x if self.positions is None else x + self.positions[positions].to(self.dtype)


@dataclass(slots=True)
class Head:
    """Hidden state → one score per vocabulary entry."""

    linear: Linear  # [vocab, h]
    divisor: float = 1.0

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, h] → [R, vocab] float32, or in ``out``, of its dtype, where that is given."""
        if out is not None and out.dtype == hidden.dtype and isinstance(self.linear, WritesInto):
            self.linear.into(hidden, out)
            return out if self.divisor == 1.0 else out.div_(self.divisor)
        scores = self.linear(hidden)
        logits = scores.float() if out is None else out.copy_(scores)
        return logits if self.divisor == 1.0 else logits.div_(self.divisor)


@dataclass(slots=True)
class Transformer:
    """The whole model, or the stretch of layers a pipeline stage holds.

    The first stage has the embedding, the last the final norm and the head; ``blocks`` start at layer
    ``first_layer``. A stage in the middle is ``run_blocks`` alone.
    """

    spec: ModelSpec
    blocks: Sequence[Block | SharedNormBlock]
    embedding: Embedding | None
    final_norm: Norm | None
    head: Head | None
    first_layer: int = 0
    stream: Callable[[Tensor], Residual] | None = None  # what blocks add to, where that is not the plain tensor
    activation_dtype: torch.dtype = torch.float32
    weight_bytes: int = 0  # memory of linear layers and embeddings
    weight_format: str = ""  # how the linear layers' weights are kept, for people
    rope: RotaryTable | None = field(init=False)
    local_rope: RotaryTable | None = field(init=False)

    def __post_init__(self) -> None:
        self.rope = RotaryTable(self.spec.rope) if self.spec.rope else None
        self.local_rope = RotaryTable(self.spec.local_rope) if self.spec.local_rope else self.rope

    def forward(
        self, token_ids: Tensor, context: BatchContext, kv: Sequence[KVLayer], last_rows: Tensor | None = None
    ) -> Tensor:
        """token_ids [M] int64 → hidden states [M, h], final norm applied; kv: one entry per block. With ``last_rows``
        (see ``BatchContext``) theirs alone, [S, h]."""
        return self.finish(self.run_blocks(self.embed(token_ids, context), context, kv, last_rows))

    def embed(self, token_ids: Tensor, context: BatchContext) -> Tensor:
        """[M] int64 → [M, h]."""
        assert self.embedding is not None, "only the first pipeline stage embeds"
        return self.embedding(token_ids, context.positions)

    def run_blocks(
        self, x: Residual, context: BatchContext, kv: Sequence[KVLayer], last_rows: Tensor | None = None
    ) -> Residual:
        """[M, h] → [M, h] through this stage's layers. With ``last_rows``, the model's last layer goes on with those
        alone once it has kept everyone's keys and values."""
        if self.stream is not None:
            x = self.stream(total(x))
        full = self._rotation(self.rope, context)
        local = full if self.local_rope is self.rope else self._rotation(self.local_rope, context)
        for layer, (block, layer_kv) in enumerate(zip(self.blocks, kv, strict=True), self.first_layer):
            rotation = full if self.spec.windows[layer] is None else local
            if last_rows is not None and layer == self.spec.num_layers - 1:
                context = replace(context, last_rows=last_rows)
            x = block(x, rotation, context, layer_kv)
        return x

    def finish(self, x: Residual) -> Tensor:
        """[M, h] → [M, h], what the head and poolers read."""
        assert self.final_norm is not None, "only the last pipeline stage applies the final norm"
        return self.final_norm(x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, h] (rows that shall be sampled from) → [R, vocab] float32, or in ``out`` where that is given."""
        assert self.head is not None, "only the last pipeline stage has the head"
        return self.head(hidden, out)

    def reserve(self, max_length: int, device: torch.device) -> None:
        """Build the rotary tables for this many positions ahead of time, e.g. before a CUDA graph."""
        for table in (self.rope, self.local_rope):
            if table is not None:
                table.reserve(max_length, device)

    @staticmethod
    def _rotation(table: RotaryTable | None, context: BatchContext) -> Rotation | None:
        if table is None:
            return None
        table.reserve(context.max_kv_len, context.positions.device)
        return table(context.positions)
