"""The paged KV cache: tensors by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from foretell.config import ModelSpec
from foretell.kernels.base import KVLayer
from foretell.kv_blocks import block_bytes, plan_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["allocate", "block_bytes", "kv_cache_dtype", "plan_blocks"]


def allocate(
    spec: ModelSpec, num_blocks: tuple[int, ...], block_size: int, dtype: torch.dtype, only: range | None = None
) -> list[KVLayer]:
    """Zeroed K and V [num_blocks, num_kv_heads, block_size, head_dim] for each layer, or for those of
    a pipeline stage (``only``). Pages are mapped when first written (calloc): a generous cache costs nothing yet."""
    layers: list[KVLayer | None] = [None] * spec.num_layers
    for index, group in enumerate(spec.kv_groups):
        shape = (num_blocks[index], spec.num_kv_heads, block_size, spec.head_dim)
        for layer in (layer for layer in group.layers if only is None or layer in only):
            layers[layer] = KVLayer(_lazy_zeros(shape, dtype), _lazy_zeros(shape, dtype), index)
    return [layer for layer in layers if layer is not None]


def kv_cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of keys and values: the model's, unless the option (``options.KV_CACHE_DTYPES``) says fewer bits."""
    import torch

    return torch.float8_e4m3fn if name == "fp8" else dtype


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import torch

    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
