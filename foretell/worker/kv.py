"""The paged KV cache: tensors by layer, and how many blocks a number of bytes gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from foretell.config import ModelSpec, SchedulerConfig
from foretell.errors import ConfigError
from foretell.kernels.base import KVLayer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def block_bytes(spec: ModelSpec, block_size: int, bytes_per_element: int) -> tuple[int, ...]:
    """Bytes of one block in each KV group: K and V of all its layers."""
    per_layer = 2 * block_size * spec.num_kv_heads * spec.head_dim * bytes_per_element
    return tuple(per_layer * len(group.layers) for group in spec.kv_groups)


def plan_blocks(spec: ModelSpec, config: SchedulerConfig, kv_bytes: int, bytes_per_element: int) -> tuple[int, ...]:
    """Blocks per KV group within ``kv_bytes``. No group gets more than all sequences at full length can use;
    a sliding group no more than their windows and one step's tokens. ConfigError if nothing useful fits."""
    sizes = block_bytes(spec, config.block_size, bytes_per_element)
    most = []
    for group in spec.kv_groups:
        length = config.max_model_len
        if group.window is not None:
            length = min(length, group.window + 2 * config.block_size)
        blocks = config.max_num_seqs * math.ceil(length / config.block_size)
        if group.window is not None:
            blocks += math.ceil(config.max_num_batched_tokens / config.block_size) + 2
        most.append(blocks)
    wanted = sum(n * size for n, size in zip(most, sizes, strict=True))
    share = min(1.0, kv_bytes / wanted)
    counts = tuple(max(2, int(n * share)) for n in most)
    if sum(n * size for n, size in zip(counts, sizes, strict=True)) > max(kv_bytes, 2 * sum(sizes)):
        counts = tuple(int(n * share) for n in most)
    if min(counts) < 2 or kv_bytes < 2 * sum(sizes):
        raise ConfigError(
            f"kv_cache_bytes={kv_bytes} holds fewer than two blocks of {config.block_size} tokens "
            f"({sum(sizes)} bytes each): raise it, or lower block_size"
        )
    return counts


def allocate(spec: ModelSpec, num_blocks: tuple[int, ...], block_size: int, dtype: torch.dtype) -> list[KVLayer]:
    """Zeroed K and V [num_blocks, num_kv_heads, block_size, head_dim] for each layer. Pages are mapped when
    first written (calloc), so a generous cache costs nothing until it is used."""
    layers: list[KVLayer | None] = [None] * spec.num_layers
    for index, group in enumerate(spec.kv_groups):
        shape = (num_blocks[index], spec.num_kv_heads, block_size, spec.head_dim)
        for layer in group.layers:
            layers[layer] = KVLayer(_lazy_zeros(shape, dtype), _lazy_zeros(shape, dtype), index)
    return [layer for layer in layers if layer is not None]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import torch

    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
