"""One rank's share of the weights: a ``Weights`` around a ``Weights``, so that the builder need not know."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.model.weights import Take, Weights
from foretell.store.gguf_rows import QuantisedRows, block_width

WHOLE, ONCE = "whole", "once"  # every rank has all of it; the first has it and the others zeros (added in a sum)


@dataclass(frozen=True, slots=True)
class Cut:
    """Entries [start, stop) of a dimension, filled up with zeros to ``size``."""

    dim: int
    start: int
    stop: int
    size: int

    def take(self, tensor: Tensor) -> Tensor:
        """A view of the share, or a padded copy at the edge."""
        part = tensor.narrow(self.dim, self.start, self.stop - self.start)
        missing = self.size - (self.stop - self.start)
        if not missing:
            return part
        shape = [*part.shape]
        shape[self.dim] = missing
        return torch.cat([part, part.new_zeros(shape)], dim=self.dim)


class ShardedWeights:
    """What shard ``shard`` of ``tp`` reads. Rows of q, k, v, gate, up and the vocabulary; columns of o and down,
    whose biases only the first shard adds. ``whole`` reads the unsplit model's weights."""

    def __init__(self, whole: Weights, spec: ModelSpec, tp: int, shard: int) -> None:
        self.whole, self.spec, self.tp, self.shard = whole, spec, tp, shard

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        cut = self.cut(name)
        if isinstance(cut, Cut) and (rows := self.blocks(name)) is not None:  # only these are dequantised
            tensor = rows[torch.arange(rows.shape[0])].to(dtype)
        elif isinstance(cut, Cut):
            tensor = self.whole.read(name, dtype, cut.take)
        else:
            tensor = self.whole.read(name, dtype)
            if cut == ONCE and self.shard:
                tensor = torch.zeros_like(tensor)
        return tensor if take is None else take(tensor)

    def blocks(self, name: str) -> QuantisedRows | None:
        """Quantised blocks lie along the rows: a share of columns must begin and end between two of them, and a
        share that needs zeros has none."""
        cut, rows = self.cut(name), self.whole.blocks(name)
        if rows is None or not isinstance(cut, Cut):
            return rows if cut == WHOLE else None
        if cut.size != cut.stop - cut.start:
            return None
        if cut.dim == 0:
            return replace(rows, raw=rows.raw[cut.start : cut.stop])
        width, width_bytes = block_width(rows.quant_type)
        if cut.start % width or cut.stop % width:
            return None
        return replace(rows, raw=rows.raw[:, cut.start // width * width_bytes : cut.stop // width * width_bytes])

    def cut(self, name: str) -> Cut | str:
        """The share of a canonical weight."""
        spec = self.spec
        part, kind = name.rsplit(".", 1)
        if part.startswith("layers."):
            part = part.split(".", 2)[2]
        match part:
            case "embedding" | "lm_head":
                return self._even(0, spec.vocab_size)
            case "attention.q":
                return self._heads(0, spec.num_heads)
            case "attention.k" | "attention.v":
                return self._heads(0, spec.num_kv_heads)
            case "attention.q_norm" if spec.qk_norm == "full":
                return self._heads(0, spec.num_heads)
            case "attention.k_norm" if spec.qk_norm == "full":
                return self._heads(0, spec.num_kv_heads)
            case "attention.o":
                return self._heads(1, spec.num_heads) if kind == "weight" else ONCE
            case "mlp.gate" | "mlp.up":
                return self._even(0, spec.intermediate_size)
            case "mlp.down":
                return self._even(1, spec.intermediate_size) if kind == "weight" else ONCE
            case _:
                return WHOLE

    def _heads(self, dim: int, heads: int) -> Cut:
        """Whole heads; with fewer heads than ranks, several ranks have the same one."""
        each = max(1, heads // self.tp)
        first = self.shard * heads // self.tp
        width = self.spec.head_dim
        return Cut(dim, first * width, (first + each) * width, each * width)

    def _even(self, dim: int, size: int) -> Cut:
        each = -(-size // self.tp)
        start = min(size, self.shard * each)
        return Cut(dim, start, min(size, start + each), each)
