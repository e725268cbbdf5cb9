"""Weights that go to a GPU: made there, or read from files by many threads through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.model.parameters import weight_shapes
from foretell.model.weights import Take, hash_of
from foretell.store.gguf_rows import QuantisedRows


class DeviceDummyWeights:
    """Random weights within ±1e-3 (norms 1, biases 0), made on the device in milliseconds: as much memory and work
    as real ones, and no zeros, which multiply faster than numbers do."""

    BLOCK = (1 << 22) + 7  # odd, so that repetitions do not align with rows
    SCALE = 1e-3

    def __init__(self, spec: ModelSpec, seed: int, device: torch.device) -> None:
        self.shapes = weight_shapes(spec)
        self.device = device
        generator = torch.Generator(device).manual_seed(seed)
        self.block = (torch.rand(self.BLOCK, generator=generator, device=device) * 2 - 1) * self.SCALE

    def blocks(self, name: str) -> QuantisedRows | None:
        return None

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        whole = self._whole(name, dtype)
        return whole if take is None else take(whole)

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self.shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=dtype, device=self.device)
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=self.device)
        size = torch.Size(shape).numel()
        block = self.block.roll(-(hash_of(name) % self.BLOCK)).to(dtype)
        tensor = torch.empty(size, dtype=dtype, device=self.device)
        whole = size // self.BLOCK * self.BLOCK
        tensor[:whole].view(-1, self.BLOCK).copy_(block)
        tensor[whole:].copy_(block[: size - whole])
        return tensor.view(shape)
