"""From a model on a GPU to an executor: measure a step, plan every byte, allocate the KV cache, start."""

from __future__ import annotations

from collections.abc import Callable

import torch

from foretell.config import ModelSpec, SchedulerConfig
from foretell.executor.overlapped import OverlappedExecutor
from foretell.kernels.base import KVLayer
from foretell.model.transformer import Transformer
from foretell.worker.cuda_graphs import CudaGraphs
from foretell.worker.device_runner import DeviceRunner
from foretell.worker.kv import block_bytes, plan_blocks
from foretell.worker.ledger import MemoryLedger

GRAPH_BYTES = 4 << 20  # what the driver keeps of a captured step, beside its tensors


def device_kv(
    spec: ModelSpec, num_blocks: tuple[int, ...], block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVLayer]:
    """Zeroed K and V [num_blocks, num_kv_heads, block_size, head_dim] for each layer, on the device."""
    found: dict[int, KVLayer] = {}
    for index, group in enumerate(spec.kv_groups):
        shape = (num_blocks[index], spec.num_kv_heads, block_size, spec.head_dim)
        for layer in group.layers:
            k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            found[layer] = KVLayer(k, v, index)
    return [found[layer] for layer in range(spec.num_layers)]


def cuda_executor(
    model: Transformer,
    config: SchedulerConfig,
    kv_dtype: torch.dtype,
    device: torch.device,
    *,
    memory_share: float,
    kv_cache_bytes: int | None = None,
    graphs: bool = True,
    done: Callable[[str], None] = lambda phase: None,
) -> tuple[OverlappedExecutor, MemoryLedger]:
    """The executor of a model whose weights lie on the device, and its memory's ledger. ``done`` hears of phases."""
    spec, groups = model.spec, len(model.spec.kv_groups)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    model.reserve(config.max_model_len, device)
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_allocated(device)
    ledger = MemoryLedger(total, memory_share)
    ledger.entries["driver and others"] = total - free - torch.cuda.memory_reserved(device)
    ledger.entries["weights"] = ours
    one_block = device_kv(spec, (1,) * groups, config.block_size, kv_dtype, device)
    step_graphs = CudaGraphs(config.max_num_seqs) if graphs else None
    runner = DeviceRunner(model, one_block, config, (0,) * groups, device, graphs=step_graphs)
    done("buffers")
    ledger.entries["step buffers"] = runner.buffers.nbytes + runner.draws.device.nbytes
    activations, decode = runner.peak_bytes()
    done("warm-up")
    ledger.entries["activations"] = activations
    if step_graphs is not None:
        ledger.entries["graphs"] = decode + GRAPH_BYTES * len(step_graphs.sizes)
    sizes = block_bytes(spec, config.block_size, kv_dtype.itemsize)
    left = ledger.left_for_kv(kv_cache_bytes) - (0 if kv_cache_bytes else sum(sizes))
    num_blocks = plan_blocks(spec, config, left, kv_dtype.itemsize)
    with_spare = tuple(n + 1 for n in num_blocks)
    ledger.entries["KV cache"] = sum(n * size for n, size in zip(with_spare, sizes, strict=True))
    one_block.clear()
    torch.cuda.empty_cache()
    runner.use_kv(device_kv(spec, with_spare, config.block_size, kv_dtype, device), num_blocks)
    torch.cuda.synchronize(device)
    done("kv cache")
    return OverlappedExecutor(runner, num_blocks), ledger
