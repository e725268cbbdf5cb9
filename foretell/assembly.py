"""From options to a running engine: resolve, check, load, size the cache, start. Every phase is timed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.config import ModelSpec, PolicyName, SchedulerConfig
from foretell.errors import ConfigError, ForetellError

if TYPE_CHECKING:
    import torch

    from foretell.core.engine import Engine
    from foretell.executor.local import LocalExecutor
    from foretell.executor.overlapped import OverlappedExecutor
    from foretell.executor.parallel import ParallelExecutor
    from foretell.store import ModelFiles, Tokenizer
    from foretell.worker.ledger import MemoryLedger

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DEFAULT_MAX_SEQS = {"cpu": 64, "cuda": 256}
DEFAULT_MAX_TOKENS = {"cpu": 2048, "cuda": 8192}  # per step: a GPU needs thousands to be busy
DEFAULT_KV_SHARE = 0.3  # of the memory that is free when the engine starts


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may choose; None and "auto" mean that the engine chooses and says what."""

    model: str = ""
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None  # 64 on a CPU, 256 on a GPU; max_num_batched_tokens where that is less
    max_num_batched_tokens: int | None = None  # 2048 on a CPU, 8192 on a GPU
    max_chunk_tokens: int = 0
    kv_cache_bytes: int | None = None
    device: str = "auto"
    memory_share: float = 0.9  # of a GPU's memory, for everything
    block_size: int = 16
    policy: PolicyName = "mixed"
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    starvation_turns: int = 64
    admission_batch: int | None = None  # 1 on a CPU, a 32nd of max_num_seqs on a GPU
    seed: int = 0
    kernels: str = "auto"
    batch_invariant: bool = False
    num_threads: int | None = None
    offline: bool | None = None
    step_log: str | os.PathLike[str] | None = None
    tp: int = 1  # ranks that share every layer
    pp: int = 1  # stages that share the layers

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        need(bool(self.model), "no model was named: give an alias, a folder, a .gguf file or a repository id")
        need(self.dtype in DTYPES, f"dtype {self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        need(
            self.load_format in LOAD_FORMATS,
            f"load_format {self.load_format!r} is unknown: choose one of {', '.join(LOAD_FORMATS)}",
        )
        for name in ("block_size", "starvation_turns", "tp", "pp"):
            value = getattr(self, name)
            need(isinstance(value, int) and value >= 1, f"{name} must be a whole number ≥ 1, got {value!r}")
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "kv_cache_bytes",
            "num_threads",
            "admission_batch",
        ):
            value = getattr(self, name)
            need(value is None or (isinstance(value, int) and value >= 1), f"{name} must be ≥ 1, got {value!r}")
        need(
            (self.max_num_seqs or 1) <= (self.max_num_batched_tokens or self.max_num_seqs or 1),
            f"max_num_seqs ({self.max_num_seqs}) is above max_num_batched_tokens ({self.max_num_batched_tokens}): "
            "each request of a step takes a token at least: raise the one or lower the other",
        )
        need(self.max_chunk_tokens >= 0, f"max_chunk_tokens must be ≥ 0, got {self.max_chunk_tokens!r}")
        need(self.device in DEVICES, f"device {self.device!r} is unknown: choose one of {', '.join(DEVICES)}")
        need(0 < self.memory_share <= 1, f"memory_share is a share in (0, 1], got {self.memory_share!r}")
        need(0 <= self.watermark < 1, f"watermark is a share in [0, 1), got {self.watermark!r}")


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


class _Phases:
    """Times the phases of a start."""

    def __init__(self, on_phase: Callable[[str, float], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_phase = on_phase
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        if self._on_phase is not None:
            self._on_phase(name, self.seconds[name])


def assemble(
    options: EngineOptions,
    *,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_phase: Callable[[str, float], None] | None = None,
) -> Assembly:
    """Build the engine that ``options`` describes. Raises a ForetellError with the reason if it cannot be.
    ``on_phase`` hears of each phase of the start when it is done, and of its seconds."""
    phases = _Phases(on_phase)
    step_log = None if options.step_log is None else StepLog(options.step_log)
    from foretell.store import load_tokenizer, resolve

    files = resolve(options.model, offline=options.offline)
    phases.done("resolve")
    tokenizer = load_tokenizer(files)
    phases.done("tokenizer")
    import torch

    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    phases.done("import torch")
    from foretell.core.engine import Engine
    from foretell.grammar.compiler import GrammarCompiler
    from foretell.model.load import resolve_dtype, spec_for
    from foretell.worker.kv import block_bytes

    spec = spec_for(files)
    dtype = resolve_dtype(options.dtype, files)
    max_model_len = _max_model_len(options, spec)
    if files.format == "none" and options.load_format != "dummy":
        raise ForetellError(f"{files.path} holds a config but no weights: pass load_format='dummy' for random ones")
    if options.load_format not in ("auto", "dummy", files.format):
        raise ConfigError(f"load_format is {options.load_format!r}, but {files.path} is {files.format}")
    device = resolve_device(options)
    config = scheduler_config(options, max_model_len, device)
    load = _load_on_gpu if device == "cuda" else _load_ranks if options.tp * options.pp > 1 else _load_here
    loaded = load(options, files, spec, config, dtype, phases)
    sizes = block_bytes(spec, config.block_size, dtype.itemsize)
    engine = Engine(
        config,
        loaded.executor,
        [group.window for group in spec.kv_groups],
        on_event=on_event,
        on_step=step_log,
    )
    loaded.executor.use_grammars(GrammarCompiler(lambda: tokenizer, spec.vocab_size))
    return Assembly(
        options=options,
        files=files,
        spec=spec,
        tokenizer=tokenizer,
        engine=engine,
        dtype=str(dtype).removeprefix("torch."),
        weight_format=loaded.weight_format,
        kv_bytes=sum(n * size for n, size in zip(loaded.executor.num_blocks, sizes, strict=True)),
        kv_bytes_per_token=spec.kv_bytes_per_token(dtype.itemsize),
        kv_element_bytes=dtype.itemsize,
        weight_bytes=loaded.weight_bytes,
        kernels=loaded.kernels,
        max_model_len=min(max_model_len, engine.scheduler.blocks.max_tokens_per_request),
        device=device,
        ledger=loaded.ledger,
        step_log=step_log,
        phases=phases.seconds,
    )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An executor that has the model, and how it keeps it."""

    executor: LocalExecutor | OverlappedExecutor | ParallelExecutor
    weight_bytes: int
    weight_format: str
    kernels: str
    ledger: MemoryLedger | None = None


def resolve_device(options: EngineOptions) -> str:
    """ "cpu" or "cuda": a GPU is taken where there is one. ConfigError if one is asked for and there is none."""
    import torch

    if options.device == "cpu" or (options.device == "auto" and options.tp * options.pp > 1):
        return "cpu"
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ConfigError("device is 'cuda' and torch sees no GPU here: use device='cpu', or check driver and torch")
    if options.device == "cuda" and options.tp * options.pp > 1:
        raise ConfigError("tp and pp run on CPU processes only so far: use device='cpu', or one GPU")
    return "cuda" if there else "cpu"


def _load_on_gpu(
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: _Phases,
) -> _Loaded:
    """The whole model on a GPU."""
    import torch

    from foretell.kernels import get_kernels
    from foretell.model.load import load_dummy, load_model
    from foretell.worker.cuda_setup import cuda_executor

    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    phases.done("device")
    kernels = get_kernels(options.kernels, device="cuda", batch_invariant=options.batch_invariant)
    compiling = kernels.prepare(spec, dtype, options.block_size, device)
    phases.done("kernels")
    if options.load_format == "dummy":
        model = load_dummy(spec, kernels, dtype, options.seed, activation_dtype=dtype, device=device)
    else:
        model = load_model(files, spec, kernels, dtype, activation_dtype=dtype, device=device)
    phases.done("weights")
    compiling()
    phases.done("compiling")
    executor, ledger = cuda_executor(
        model,
        config,
        dtype,
        device,
        memory_share=options.memory_share,
        kv_cache_bytes=options.kv_cache_bytes,
        done=phases.done,
    )
    return _Loaded(executor, model.weight_bytes, model.weight_format, kernels.name, ledger)


def _load_here(
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: _Phases,
) -> _Loaded:
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
        model = load_model(files, spec, kernels, dtype, keep_quantised=options.dtype == "auto")
    phases.done("weights")
    num_blocks = plan_blocks(spec, config, options.kv_cache_bytes or default_kv_bytes(), dtype.itemsize)
    kv = allocate(spec, num_blocks, config.block_size, dtype)
    torch_threads = 1 if kernels.name == "cpu" else None
    runner = ModelRunner(model, kv, config.block_size, torch_threads=torch_threads)
    phases.done("kv cache")
    return _Loaded(LocalExecutor(runner, num_blocks), model.weight_bytes, model.weight_format, kernels.name)


def _load_ranks(
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    dtype: torch.dtype,
    phases: _Phases,
) -> _Loaded:
    """The model shared by tp × pp processes."""
    from foretell.parallel.start import start_parallel, weights_of

    executor = start_parallel(
        options,
        files,
        spec,
        config,
        dtype=str(dtype).removeprefix("torch."),
        element_bytes=dtype.itemsize,
        kv_bytes=options.kv_cache_bytes or default_kv_bytes(),
        memory_bytes=available_memory_bytes(),
    )
    phases.done("ranks")
    return _Loaded(executor, *weights_of(executor))


def scheduler_config(options: EngineOptions, max_model_len: int, device: str = "cpu") -> SchedulerConfig:
    most_tokens = options.max_num_batched_tokens or max(DEFAULT_MAX_TOKENS[device], options.max_num_seqs or 1)
    most_seqs = options.max_num_seqs or min(DEFAULT_MAX_SEQS[device], most_tokens)
    return SchedulerConfig(
        max_num_seqs=most_seqs,
        max_num_batched_tokens=most_tokens,
        max_model_len=max_model_len,
        max_chunk_tokens=options.max_chunk_tokens,
        block_size=options.block_size,
        policy=options.policy,
        enable_prefix_caching=options.enable_prefix_caching,
        watermark=options.watermark,
        starvation_turns=options.starvation_turns,
        admission_batch=options.admission_batch or (max(1, most_seqs // 32) if device == "cuda" else 1),
    )


def _max_model_len(options: EngineOptions, spec: ModelSpec) -> int:
    wanted = options.max_model_len
    if wanted is None:
        return spec.max_position_embeddings
    if spec.learned_positions and wanted > spec.learned_positions:
        raise ConfigError(f"max_model_len={wanted} is beyond the model's {spec.learned_positions} learned positions")
    if wanted > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={wanted} is beyond the model's context of {spec.max_position_embeddings} tokens"
        )
    return wanted


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: what the machine and, in a container, the control group leave."""
    limits = [int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)]
    machine = _fields(Path("/proc/meminfo")).get("MemAvailable:")
    if machine is not None:
        limits = [machine * 1024]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        reclaimable = _fields(group / "memory.stat").get("inactive_file", 0)
        limits.append(max(0, limit - used + reclaimable))
    return min(limits)


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name number …"; empty if there is no such file."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def default_kv_bytes() -> int:
    return int(available_memory_bytes() * DEFAULT_KV_SHARE)


class StepLog:
    """One JSON line per step, appended to a file as the steps happen. A log that cannot be written any more is
    given up with one warning: the requests matter more."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            # open for as long as the engine lives
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"the step log {os.fspath(path)} cannot be written: {error.strerror}") from error

    def __call__(self, record: dict[str, Any]) -> None:
        try:
            if not self._file.closed:
                self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"warning: the step log ends here: {error.strerror}", file=sys.stderr)
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
