"""From options to a running engine: resolve, check, load, size the cache, start. Every phase is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foretell.cpus import usable_cpus
from foretell.errors import ConfigError, ForetellError
from foretell.executor.load import Phases, load
from foretell.options import EngineOptions, context_len, gpu_bytes, resolve_device, scheduler_config
from foretell.step_log import StepLog

if TYPE_CHECKING:
    from foretell.config import ModelSpec
    from foretell.core.engine import Engine
    from foretell.executor.load import Loaded
    from foretell.store import ModelFiles, Tokenizer
    from foretell.worker.ledger import MemoryLedger

__all__ = ["Assembly", "EngineOptions", "assemble"]


@dataclass(slots=True)
class Assembly:
    """The parts of a running engine, and how long each phase of its start took (seconds)."""

    options: EngineOptions
    files: ModelFiles
    spec: ModelSpec
    tokenizer: Tokenizer | None
    engine: Engine
    dtype: str  # of the KV cache, and of the weights unless they stay as shipped
    weight_format: str
    kv_bytes: int
    kv_bytes_per_token: int
    kv_element_bytes: int
    weight_bytes: int
    kernels: str
    max_model_len: int
    device: str = "cpu"
    ledger: MemoryLedger | None = None  # of a GPU's memory
    step_log: StepLog | None = None
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokenizer's end tokens; without a tokenizer, those that the model's configuration names."""
        if self.tokenizer is not None:
            return list(self.tokenizer.eos_token_ids)
        config = {**(self.files.config or {}), **(self.files.generation_config or {})}
        eos = config.get("eos_token_id")
        return [eos] if isinstance(eos, int) else [i for i in eos or () if isinstance(i, int)]

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds at once; sliding windows give theirs back, so full attention decides."""
        blocks = self.engine.scheduler.blocks
        groups = list(zip(blocks.pools, blocks.windows, strict=True))
        full = [pool.num_blocks for pool, window in groups if window is None]
        return min(full or [pool.num_blocks for pool, _ in groups]) * blocks.block_size


def assemble(
    options: EngineOptions,
    *,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_phase: Callable[[str, float], None] | None = None,
    on_load: Callable[[int, int], None] | None = None,
) -> Assembly:
    """Build the engine that ``options`` describes. Raises a ForetellError with the reason if it cannot be.
    ``on_phase`` hears of each phase of the start when it is done, and of its seconds; ``on_load`` of the bytes of
    weights loaded and in all, from several threads, one at a time."""
    phases = Phases(on_phase, on_load)
    with contextlib.ExitStack() as undo:  # a start that fails leaves nothing open or running
        step_log = None if options.step_log is None else StepLog(options.step_log)
        if step_log is not None:
            undo.callback(step_log.close)
        from foretell.store import load_tokenizer, resolve

        files = resolve(options.model, offline=options.offline)
        phases.done("resolve")
        tokenizer = load_tokenizer(files)
        phases.done("tokenizer")
        import torch

        if options.num_threads:
            torch.set_num_threads(options.num_threads)
        phases.done("import torch")
        made = _start(options, files, tokenizer, phases, step_log, on_event, undo)
        undo.pop_all()
    return made


def _start(
    options: EngineOptions,
    files: ModelFiles,
    tokenizer: Tokenizer | None,
    phases: Phases,
    step_log: StepLog | None,
    on_event: Callable[[dict[str, Any]], None] | None,
    undo: contextlib.ExitStack,
) -> Assembly:
    from foretell.core.engine import Engine
    from foretell.grammar.compiler import GrammarCompiler
    from foretell.model.load import resolve_dtype, spec_for
    from foretell.worker.kv import block_bytes, kv_cache_dtype

    spec, dtype = spec_for(files), resolve_dtype(options.dtype, files)
    max_model_len = context_len(options, spec)
    _check_weights(options, files)
    device = resolve_device(options)
    config = scheduler_config(options, max_model_len, device, gpu_bytes(device))
    loaded = load(device, options, files, spec, config, dtype, phases)
    executor = loaded.executor
    undo.callback(executor.close)
    engine = Engine(config, executor, [g.window for g in spec.kv_groups], on_event=on_event, on_step=step_log)
    executor.use_grammars(GrammarCompiler(lambda: tokenizer, spec.vocab_size))
    _watch(engine, options, device, files.name, spec, loaded)
    kv_dtype = kv_cache_dtype(options.kv_cache_dtype, dtype)
    sizes = block_bytes(spec, config.block_size, kv_dtype.itemsize)
    return Assembly(
        options=options,
        files=files,
        spec=spec,
        tokenizer=tokenizer,
        engine=engine,
        dtype=str(kv_dtype).removeprefix("torch."),
        weight_format=loaded.weight_format,
        kv_bytes=sum(n * size for n, size in zip(executor.num_blocks, sizes, strict=True)),
        kv_bytes_per_token=spec.kv_bytes_per_token(kv_dtype.itemsize),
        kv_element_bytes=kv_dtype.itemsize,
        weight_bytes=loaded.weight_bytes,
        kernels=loaded.kernels,
        max_model_len=min(max_model_len, engine.scheduler.blocks.max_tokens_per_request),
        device=device,
        ledger=loaded.ledger,
        step_log=step_log,
        phases=phases.seconds,
    )


def _watch(engine: Engine, options: EngineOptions, device: str, model: str, spec: ModelSpec, loaded: Loaded) -> None:
    """Compare each step with its prediction, where this machine was calibrated for this engine."""
    from foretell.cost.named import find_profile

    if options.tp * options.pp > 1:
        return
    threads = 0 if device == "cuda" else options.num_threads or usable_cpus()
    profile = find_profile(
        spec, model=model, kernels=loaded.kernels, weight_format=loaded.weight_format, num_threads=threads
    )
    if profile is not None:
        from foretell.cost.watch import StepWatch

        engine.watcher = StepWatch(profile)


def _check_weights(options: EngineOptions, files: ModelFiles) -> None:
    if files.format == "none" and options.load_format != "dummy":
        raise ForetellError(f"{files.path} holds a config but no weights: pass load_format='dummy' for random ones")
    if options.load_format not in ("auto", "dummy", files.format):
        raise ConfigError(f"load_format is {options.load_format!r}, but {files.path} is {files.format}")
