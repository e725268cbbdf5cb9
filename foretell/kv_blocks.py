"""How many KV blocks a number of bytes gives, by KV group. No torch: the planner asks this for every layout."""

from __future__ import annotations

import math

from foretell.config import ModelSpec, SchedulerConfig
from foretell.errors import ConfigError


def block_bytes(
    spec: ModelSpec, block_size: int, bytes_per_element: int, only: range | None = None
) -> tuple[int, ...]:
    """Bytes of one block in each KV group: K and V of all its layers, or of those of a pipeline stage (``only``)."""
    per_layer = 2 * block_size * spec.num_kv_heads * spec.head_dim * bytes_per_element
    return tuple(per_layer * sum(only is None or layer in only for layer in group.layers) for group in spec.kv_groups)


def plan_blocks(
    spec: ModelSpec, config: SchedulerConfig, kv_bytes: int, bytes_per_element: int, only: range | None = None
) -> tuple[int, ...]:
    """Blocks per KV group within ``kv_bytes``, which all layers share, or those of a pipeline stage (``only``). No
    group gets more than all sequences at full length can use; a sliding group no more than their windows and one
    step's tokens. ConfigError if nothing useful fits."""
    sizes = block_bytes(spec, config.block_size, bytes_per_element, only)
    most, least = zip(*(_bounds(group.window, config) for group in spec.kv_groups), strict=True)
    needed = sum(n * size for n, size in zip(least, sizes, strict=True))
    if kv_bytes < needed:
        raise ConfigError(
            f"kv_cache_bytes={kv_bytes} is too little: blocks of {config.block_size} tokens for one sequence take "
            f"{needed} bytes: raise it, or lower block_size"
        )
    sliding = [i for i, group in enumerate(spec.kv_groups) if group.window is not None]
    full = [i for i, group in enumerate(spec.kv_groups) if group.window is None]
    counts = [few if size else many for few, many, size in zip(least, most, sizes, strict=True)]
    # Sliding groups first, with up to half: they bound how many sequences run, full ones how long they get
    for groups, divisor in ((sliding, 2 if full else 1), (full, 1), (sliding, 1)):
        spare = (kv_bytes - sum(n * size for n, size in zip(counts, sizes, strict=True))) // divisor
        wanted = sum((most[i] - counts[i]) * sizes[i] for i in groups)
        for i in groups if wanted > 0 else ():
            counts[i] += (most[i] - counts[i]) * min(spare, wanted) // wanted
    return tuple(counts)


def _bounds(window: int | None, config: SchedulerConfig) -> tuple[int, int]:
    """Blocks of a group that all sequences at full length can use, and that one sequence needs."""
    size, length = config.block_size, config.max_model_len
    if window is None:
        return max(2, config.max_num_seqs * math.ceil(length / size)), 2
    least = math.ceil(min(length, window) / size) + 2
    per_sequence = math.ceil(min(length, window + 2 * size) / size)
    step = math.ceil(config.max_num_batched_tokens / size) + 2
    return max(least, config.max_num_seqs * per_sequence + step), least
