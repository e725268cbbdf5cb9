"""Model and executor together: on a GPU, in this process, or shared by ranks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foretell.memory import available_memory_bytes, default_kv_bytes

if TYPE_CHECKING:
    import torch

    from foretell.config import ModelSpec, SchedulerConfig
    from foretell.executor.local import LocalExecutor
    from foretell.executor.overlapped import OverlappedExecutor
    from foretell.executor.parallel import ParallelExecutor
    from foretell.options import EngineOptions
    from foretell.store import ModelFiles
    from foretell.worker.ledger import MemoryLedger


class Phases:
    """Times the phases of a start."""

    def __init__(
        self, on_phase: Callable[[str, float], None] | None, on_load: Callable[[int, int], None] | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._on_phase, self._on_load = on_phase, on_load
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        if self._on_phase is not None:
            self._on_phase(name, self.seconds[name])

    def loading(self, dtype: torch.dtype) -> Callable[[int, int], None] | None:
        """To be told of parameters loaded and in all, in this dtype; None if nobody wants to know."""
        tell, size = self._on_load, dtype.itemsize
        return None if tell is None else lambda done, total: tell(done * size, total * size)


@dataclass(frozen=True, slots=True)
class Loaded:
    """An executor that has the model, and how it keeps it."""

    executor: LocalExecutor | OverlappedExecutor | ParallelExecutor
    weight_bytes: int
    weight_format: str
    kernels: str
    ledger: MemoryLedger | None = None


def load(
    device: str,
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: Phases,
) -> Loaded:
    """The model where the options want it; ``device`` is "cpu" or "cuda"."""
    if options.tp * options.pp > 1:
        return _load_ranks(device, options, files, spec, config, dtype, phases)
    load_there = _load_on_gpu if device == "cuda" else _load_here
    return load_there(options, files, spec, config, dtype, phases)


def _load_on_gpu(
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: Phases,
) -> Loaded:
    """The whole model on a GPU."""
    import torch

    from foretell.executor.overlapped import OverlappedExecutor
    from foretell.kernels import get_kernels
    from foretell.model.load import load_dummy, load_model
    from foretell.worker.cuda_setup import cuda_runner
    from foretell.worker.kv import kv_cache_dtype

    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    phases.done("device")
    kernels = get_kernels(options.kernels, device="cuda", batch_invariant=options.batch_invariant)
    kv_dtype, kept_as = kv_cache_dtype(options.kv_cache_dtype, dtype), options.quantization
    compiling = kernels.prepare(spec, dtype, options.block_size, device, kv_dtype=kv_dtype, quantization=kept_as)
    gc.collect()
    gc.freeze()  # modules stay: looking at them again took the collector 100 ms, many steps' time, every few seconds
    phases.done("kernels")
    if options.load_format == "dummy":
        model = load_dummy(
            spec, kernels, dtype, options.seed, activation_dtype=dtype, device=device, quantization=kept_as
        )
    else:
        progress = phases.loading(dtype)
        model = load_model(
            files, spec, kernels, dtype, progress, activation_dtype=dtype, device=device, quantization=kept_as
        )
    phases.done("weights")
    compiling()
    phases.done("compiling")
    runner, num_blocks, ledger = cuda_runner(
        model,
        config,
        kv_dtype,
        device,
        memory_share=options.memory_share,
        kv_cache_bytes=options.kv_cache_bytes,
        done=phases.done,
    )
    executor = OverlappedExecutor(runner, num_blocks)
    return Loaded(executor, model.weight_bytes, model.weight_format, kernels.name, ledger)


def _load_here(
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: Phases,
) -> Loaded:
    """The whole model in this process."""
    from foretell.executor.local import LocalExecutor
    from foretell.kernels import get_kernels
    from foretell.model.load import load_dummy, load_model
    from foretell.worker.kv import allocate, plan_blocks
    from foretell.worker.runner import ModelRunner

    kernels = get_kernels(options.kernels, batch_invariant=options.batch_invariant)
    phases.done("kernels")
    if options.load_format == "dummy":
        model = load_dummy(spec, kernels, dtype, options.seed)
    else:
        progress = phases.loading(dtype)
        model = load_model(files, spec, kernels, dtype, progress, keep_quantised=options.dtype == "auto")
    phases.done("weights")
    num_blocks = plan_blocks(spec, config, options.kv_cache_bytes or default_kv_bytes(), dtype.itemsize)
    kv = allocate(spec, num_blocks, config.block_size, dtype)
    torch_threads = 1 if kernels.name == "cpu" else None
    runner = ModelRunner(model, kv, config.block_size, torch_threads=torch_threads)
    phases.done("kv cache")
    return Loaded(LocalExecutor(runner, num_blocks), model.weight_bytes, model.weight_format, kernels.name)


def _load_ranks(
    device: str,
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: Phases,
) -> Loaded:
    """The model shared by tp × pp processes."""
    from foretell.parallel.start import start_parallel, weights_of

    executor = start_parallel(
        options,
        files,
        spec,
        config,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        element_bytes=dtype.itemsize,
        kv_bytes=options.kv_cache_bytes or default_kv_bytes(),
        memory_bytes=available_memory_bytes(),
    )
    phases.done("ranks")
    return Loaded(executor, *weights_of(executor))
