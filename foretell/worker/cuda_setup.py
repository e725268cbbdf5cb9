"""From a model on a GPU to a runner: measure a step, plan every byte, allocate the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from foretell.config import ModelSpec, SchedulerConfig
from foretell.kernels.base import KVLayer
from foretell.model.transformer import Transformer
from foretell.worker.cuda_graphs import CudaGraphs
from foretell.worker.device_runner import DeviceRunner
from foretell.worker.kv import block_bytes, plan_blocks
from foretell.worker.ledger import MemoryLedger

GRAPH_BYTES = 4 << 20  # what the driver keeps of a captured step, beside its tensors


class MakeRunner(Protocol):
    """A runner of this model, with a KV cache of these blocks besides the spare ones."""

    def __call__(
        self, kv: list[KVLayer], spare_blocks: tuple[int, ...], *, graphs: CudaGraphs | None
    ) -> DeviceRunner: ...


def device_kv(
    spec: ModelSpec,
    num_blocks: tuple[int, ...],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    only: range | None = None,
) -> list[KVLayer]:
    """Zeroed K and V [num_blocks, num_kv_heads, block_size, head_dim] for each layer, or for those of a pipeline
    stage (``only``), on the device."""
    layers = range(spec.num_layers) if only is None else only
    found: dict[int, KVLayer] = {}
    for index, group in enumerate(spec.kv_groups):
        shape = (num_blocks[index], spec.num_kv_heads, block_size, spec.head_dim)
        for layer in (layer for layer in group.layers if layer in layers):
            k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            found[layer] = KVLayer(k, v, index)
    return [found[layer] for layer in layers]


def cuda_runner(
    model: Transformer,
    config: SchedulerConfig,
    kv_dtype: torch.dtype,
    device: torch.device,
    *,
    memory_share: float,
    kv_cache_bytes: int | None = None,
    graphs: bool = True,
    done: Callable[[str], None] = lambda phase: None,
    make: MakeRunner | None = None,
    layers: range | None = None,
    least: Callable[[int], int] = lambda number: number,
) -> tuple[DeviceRunner, tuple[int, ...], MemoryLedger]:
    """The runner of a model whose weights lie on the device, the blocks of its KV cache that the scheduler may use,
    and its memory's ledger. ``done`` hears of phases.

    Of a rank among others: ``make`` is its own kind of runner, ``layers`` are its stage's, and ``least`` gives the
    least that any rank has of what this one has, for all have as many blocks."""
    spec, groups = model.spec, len(model.spec.kv_groups)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    model.reserve(config.max_model_len, device)
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_allocated(device)
    ledger = MemoryLedger(total, memory_share)
    ledger.entries["driver and others"] = total - free - torch.cuda.memory_reserved(device)
    ledger.entries["weights"] = ours
    one_block = device_kv(spec, (1,) * groups, config.block_size, kv_dtype, device, layers)
    step_graphs = CudaGraphs(config.max_num_seqs) if graphs else None
    if make is None:
        runner = DeviceRunner(model, one_block, config, (0,) * groups, device, graphs=step_graphs)
    else:
        runner = make(one_block, (0,) * groups, graphs=step_graphs)
    done("buffers")
    ledger.entries["step buffers"] = runner.nbytes
    activations, decode = runner.peak_bytes()
    done("warm-up")
    ledger.entries["activations"] = activations
    if step_graphs is not None:
        ledger.entries["graphs"] = decode + GRAPH_BYTES * len(step_graphs.sizes)
    sizes = block_bytes(spec, config.block_size, kv_dtype.itemsize, layers)
    left = ledger.left_for_kv(kv_cache_bytes) - (0 if kv_cache_bytes else sum(sizes))
    planned = plan_blocks(spec, config, left, kv_dtype.itemsize, layers)
    num_blocks = tuple(least(number) for number in planned)
    with_spare = tuple(n + 1 for n in num_blocks)
    ledger.entries["KV cache"] = sum(n * size for n, size in zip(with_spare, sizes, strict=True))
    one_block.clear()
    torch.cuda.empty_cache()
    runner.use_kv(device_kv(spec, with_spare, config.block_size, kv_dtype, device, layers), num_blocks)
    torch.cuda.synchronize(device)
    done("kv cache")
    return runner, num_blocks, ledger
