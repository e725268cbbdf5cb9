"""Rows of quantised GGUF matrices as the file has them, turned into floats only when looked up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from foretell.store.gguf_dequant import dequantise
from foretell.store.gguf_file import GGUFSource
from foretell.store.gguf_header import GGML_TYPES
from foretell.store.tensors import TensorSource

_BLOCKS: Final = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}
# Where a block has its float16 numbers; with those finite all of its weights are.
_HALVES: Final[dict[str, tuple[int, ...]]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip

_SCALE_ALONE: Final = {"Q4_0", "Q5_0", "Q8_0"}


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """A matrix [rows, columns] in blocks along its rows."""

    raw: Tensor  # [rows, bytes per row] uint8
    quant_type: str

    @property
    def shape(self) -> tuple[int, int]:
        block, block_bytes = _BLOCKS[self.quant_type]
        return self.raw.shape[0], self.raw.shape[1] // block_bytes * block

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def __getitem__(self, rows: Tensor) -> Tensor:
        """These rows in float32."""
        block, block_bytes = _BLOCKS[self.quant_type]
        raw = self.raw[rows].view(-1, block_bytes)
        return dequantise(raw, self.quant_type, block, torch.float32).view(*rows.shape, -1)

    def clone(self) -> QuantisedRows:
        return replace(self, raw=self.raw.clone())

    def widened(self) -> QuantisedRows:
        """The same numbers as Q8_0, of types that have a scale alone."""
        if self.quant_type == "Q8_0":
            return self
        block, block_bytes = _BLOCKS[self.quant_type]
        blocks = self.raw.reshape(-1, block_bytes).clone()
        scales = blocks[:, :2].clone()
        blocks[:, :2] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # 1.0: what comes out is the integers
        integers = dequantise(blocks, self.quant_type, block, torch.float32).view(-1, block)
        raw = torch.cat([scales, integers.to(torch.int8).view(torch.uint8)], dim=1)
        return QuantisedRows(raw.view(self.raw.shape[0], -1), "Q8_0")

    def is_finite(self) -> bool:
        _, block_bytes = _BLOCKS[self.quant_type]
        blocks = self.raw.reshape(-1, block_bytes)
        halves = (blocks[:, at : at + 2].contiguous().view(torch.float16) for at in _HALVES[self.quant_type])
        return all(bool(h.isfinite().all()) for h in halves)


def block_width(quant_type: str) -> tuple[int, int]:
    """Weights in a block of this type, and its bytes."""
    return _BLOCKS[quant_type]


def stacked(parts: list[QuantisedRows]) -> QuantisedRows | None:
    """All the rows below each other; None where their types have no common one."""
    types = {part.quant_type for part in parts}
    if len(types) > 1:
        if not types <= _SCALE_ALONE:
            return None
        parts = [part.widened() for part in parts]
    return parts[0] if len(parts) == 1 else replace(parts[0], raw=torch.cat([part.raw for part in parts]))


def quantised_rows(source: TensorSource, name: str) -> QuantisedRows | None:
    """The tensor's blocks, memory-mapped; None where it is no matrix of a type known here."""
    if not isinstance(source, GGUFSource) or len(source.shape(name)) != 2:
        return None
    quant_type = source.quant_type(name)
    return QuantisedRows(source.raw(name), quant_type) if quant_type in _HALVES else None
