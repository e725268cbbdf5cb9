"""Engine options → a running ParallelExecutor. The driver computes nothing: the ranks do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foretell.cpus import usable_cpus
from foretell.errors import ConfigError
from foretell.executor.parallel import ParallelExecutor, ready_of
from foretell.parallel.layout import make_layout, rank_parameters
from foretell.parallel.meeting import Meeting
from foretell.parallel.messages import Setup
from foretell.worker.kv import plan_blocks

if TYPE_CHECKING:
    from foretell.assembly import EngineOptions
    from foretell.config import ModelSpec, SchedulerConfig
    from foretell.store import ModelFiles

COLLECTIVE_SECONDS = 120.0


def start_parallel(
    options: EngineOptions,
    files: ModelFiles,
    spec: ModelSpec,
    config: SchedulerConfig,
    *,
    device: str,
    dtype: str,
    element_bytes: int,
    kv_bytes: int,
    memory_bytes: int,
) -> ParallelExecutor:
    """Ranks on this machine, or those that slots on a cluster's hosts started to come here; ``kv_bytes`` of KV cache
    and ``memory_bytes`` of free memory are shared by all of them. On GPUs the ranks find out what fits.

    ConfigError, before anything is loaded, for a layout that the model or the memory does not allow."""
    layout, on_cpu = make_layout(spec, options.tp, options.pp), device == "cpu"
    meeting = Meeting.from_environment()
    if meeting is not None:
        memory_bytes = meeting.memory_bytes
    elif not on_cpu:
        check_gpus(layout.num_ranks)
    needed = sum(rank_parameters(spec, layout)) * element_bytes
    if on_cpu and options.dtype != "auto" and needed > memory_bytes:
        raise ConfigError(
            f"tp={options.tp} pp={options.pp} needs {needed / 1e9:.1f} GB for weights on all ranks together and "
            f"{memory_bytes / 1e9:.1f} GB are free: choose a smaller dtype or fewer replicas of key/value heads"
        )
    held = layout.tp * max(1, spec.num_kv_heads // layout.tp)  # key/value heads on all shards, replicas included
    num_blocks = plan_blocks(spec, config, kv_bytes * spec.num_kv_heads // held, element_bytes) if on_cpu else ()
    threads = max(1, (options.num_threads or usable_cpus()) // layout.num_ranks)
    own_bytes = None if options.kv_cache_bytes is None else -(-options.kv_cache_bytes // layout.num_ranks)

    def setup(rank: int, store_url: str) -> Setup:
        return Setup(
            model=str(files.path) if meeting is None else options.model,
            load_format=options.load_format,
            dtype=dtype,
            kernels=options.kernels,
            batch_invariant=options.batch_invariant,
            keep_quantised=options.dtype == "auto",
            num_threads=threads,
            seed=options.seed,
            tp=options.tp,
            pp=options.pp,
            rank=rank,
            num_blocks=list(num_blocks),
            config=config,
            store_url=store_url,
            timeout_seconds=COLLECTIVE_SECONDS,
            offline=True if meeting is None else options.offline,
            device=device,
            memory_share=options.memory_share,
            kv_cache_bytes=own_bytes,
            kv_cache_dtype=options.kv_cache_dtype,
            quantization=options.quantization,
        )

    return ParallelExecutor(layout, setup, device=device, meeting=meeting)


def check_gpus(ranks: int) -> None:
    """ConfigError where there are fewer GPUs than ranks."""
    import torch

    if (here := torch.cuda.device_count()) < ranks:
        raise ConfigError(f"{ranks} ranks need a GPU each and {here} are here: lower tp or pp, or use device='cpu'")


def weights_of(executor: ParallelExecutor) -> tuple[int, str, str]:
    """(bytes on all ranks together, how they are kept, kernels)."""
    ready = ready_of(executor.ranks)
    formats = sorted({part for rank in ready for part in rank.weight_format.removesuffix(" as shipped").split("+")})
    shipped = " as shipped" if any(rank.weight_format.endswith("as shipped") for rank in ready) else ""
    return sum(rank.weight_bytes for rank in ready), "+".join(formats) + shipped, ready[0].kernels
