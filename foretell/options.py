"""What a user may choose of an engine, checked before anything is loaded, and what follows from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from foretell.config import ModelSpec, PolicyName, SchedulerConfig
from foretell.core.policy import POLICIES
from foretell.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
QUANTIZATIONS = ("int8", "int4", "fp8")
KV_CACHE_DTYPES = ("auto", "fp8")
MAX_THREADS = 1024
DEFAULT_MAX_SEQS = {"cpu": 64, "cuda": 256}
# per step: a GPU needs thousands to be busy; a CPU is with hundreds, and everybody waits for a step that is long
DEFAULT_MAX_TOKENS = {"cpu": 512, "cuda": 8192}
# on a GPU whose tokens nobody watches: fewer steps, and tiles that fill it better; the second with LARGE_GPU bytes
BATCH_MAX_TOKENS = (16384, 32768)
LARGE_GPU = 64 << 30


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a user may choose; None and "auto" mean that the engine chooses and says what."""

    model: str = ""
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None  # 64 on a CPU, 256 on a GPU; max_num_batched_tokens where that is less
    max_num_batched_tokens: int | None = None  # 512 on a CPU, 8192 on a GPU, more there if not interactive
    max_chunk_tokens: int = 0
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"  # "fp8": half the bytes, GPUs only
    quantization: str | None = None  # of linear layers, while they load, GPUs only: "int8", "int4" or "fp8"
    device: str = "auto"
    memory_share: float = 0.9  # of a GPU's memory, for everything
    block_size: int = 16
    policy: PolicyName | Literal["auto"] = "auto"  # mixed; prefill-first on a GPU whose tokens nobody watches
    interactive: bool = True  # requests come when they like and tokens are watched; else only the end counts
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
        self._check_numbers()
        _need(bool(self.model), "no model was named: give an alias, a folder, a .gguf file or a repository id")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            _need(value in known, f"{name} {value!r} is unknown: choose one of {', '.join(known)}")
        _need(
            self.quantization in (None, *QUANTIZATIONS),
            f"quantization {self.quantization!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}, or none",
        )
        _need(
            self.step_log is None or isinstance(self.step_log, (str, os.PathLike)),
            f"step_log is the name of a file, got {self.step_log!r}",
        )
        for name in ("enable_prefix_caching", "batch_invariant", "interactive"):
            value = getattr(self, name)
            _need(value is True or value is False, f"{name} is True or False, got {value!r}")
        _need(
            (self.max_num_seqs or 1) <= (self.max_num_batched_tokens or self.max_num_seqs or 1),
            f"max_num_seqs ({self.max_num_seqs}) is above max_num_batched_tokens ({self.max_num_batched_tokens}): "
            "each request of a step takes a token at least: raise the one or lower the other",
        )

    def _check_numbers(self) -> None:
        for name in ("block_size", "starvation_turns", "tp", "pp"):
            value = getattr(self, name)
            _need(_is_int(value) and value >= 1, f"{name} must be a whole number ≥ 1, got {value!r}")
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "kv_cache_bytes",
            "num_threads",
            "admission_batch",
        ):
            value = getattr(self, name)
            _need(value is None or (_is_int(value) and value >= 1), f"{name} must be ≥ 1, got {value!r}")
        _need(
            (self.num_threads or 1) <= MAX_THREADS, f"num_threads must be ≤ {MAX_THREADS}, got {self.num_threads!r}"
        )
        chunk, share, seed = self.max_chunk_tokens, self.memory_share, self.seed
        _need(_is_int(chunk) and chunk >= 0, f"max_chunk_tokens must be ≥ 0, got {chunk!r}")
        _need(_is_number(share) and 0 < share <= 1, f"memory_share is a share in (0, 1], got {share!r}")
        _need(
            _is_number(self.watermark) and 0 <= self.watermark < 1,
            f"watermark is a share in [0, 1), got {self.watermark!r}",
        )
        _need(_is_int(seed) and -(2**63) <= seed < 2**64, f"seed must be a whole number of 64 bits, got {seed!r}")


_CHOICES = {
    "dtype": DTYPES,
    "load_format": LOAD_FORMATS,
    "device": DEVICES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "policy": ("auto", *POLICIES),
}


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_int(value)


def resolve_device(options: EngineOptions) -> str:
    """ "cpu" or "cuda": a GPU is taken where there is one. ConfigError if one is needed and there is none."""
    import torch

    device = _device(options)
    if device == "cpu" and options.quantization is not None:
        raise ConfigError(f"quantization={options.quantization!r} needs a GPU: on a CPU, take a quantised GGUF file")
    if device == "cpu" and options.kv_cache_dtype != "auto":
        raise ConfigError(f"kv_cache_dtype={options.kv_cache_dtype!r} needs a GPU: leave it out here")
    if "fp8" in (options.quantization, options.kv_cache_dtype) and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError("fp8 needs a GPU of compute capability 8.9 or later (Ada, Hopper): take int8 here")
    return device


def _device(options: EngineOptions) -> str:
    import torch

    if options.device == "cpu":
        return "cpu"
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ConfigError("device is 'cuda' and torch sees no GPU here: use device='cpu', or check driver and torch")
    if options.device == "auto" and torch.cuda.device_count() < options.tp * options.pp:
        return "cpu"  # ranks of a GPU each, or of none
    return "cuda" if there else "cpu"


def gpu_bytes(device: str) -> int:
    """Memory of the GPU that a model would be on; 0: of none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0


def scheduler_config(
    options: EngineOptions, max_model_len: int, device: str = "cpu", gpu_bytes: int = 0
) -> SchedulerConfig:
    """What the options leave open is chosen for the device, and for a GPU's memory where that is known."""
    unwatched = device == "cuda" and not options.interactive
    usual_tokens = BATCH_MAX_TOKENS[gpu_bytes >= LARGE_GPU] if unwatched else DEFAULT_MAX_TOKENS[device]
    if unwatched and options.pp > 1:  # a stage idles for a step at the beginning and at the end
        usual_tokens = max(DEFAULT_MAX_TOKENS[device], usual_tokens // (2 * options.pp))
    most_tokens = options.max_num_batched_tokens or max(usual_tokens, options.max_num_seqs or 1)
    most_seqs = options.max_num_seqs or min(DEFAULT_MAX_SEQS[device], most_tokens)
    return SchedulerConfig(
        max_num_seqs=most_seqs,
        max_num_batched_tokens=most_tokens,
        max_model_len=max_model_len,
        max_chunk_tokens=options.max_chunk_tokens,
        block_size=options.block_size,
        policy=options.policy if options.policy != "auto" else "prefill-first" if unwatched else "mixed",
        enable_prefix_caching=options.enable_prefix_caching,
        watermark=options.watermark,
        starvation_turns=options.starvation_turns,
        admission_batch=options.admission_batch or (max(1, most_seqs // 32) if device == "cuda" else 1),
    )


def context_len(options: EngineOptions, spec: ModelSpec) -> int:
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
