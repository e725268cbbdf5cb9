"""What both benchmarks share: the floor under a workload, checks, and the description of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foretell.benchmark.simulate import VirtualRun, simulate
from foretell.config import ModelSpec, PolicyName, SchedulerConfig
from foretell.core.params import SamplingParams
from foretell.cost import FloorCost, Hardware, WeightBytes, measure_hardware
from foretell.errors import ConfigError
from foretell.executor.local import LocalExecutor
from foretell.executor.overlapped import OverlappedExecutor
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.assembly import EngineOptions
    from foretell.llm import LLM

NOTABLY = 1.05


@dataclass(frozen=True, slots=True)
class Subject:
    """A model as configured: all that theory needs to know of it."""

    name: str
    spec: ModelSpec
    dtype: str
    config: SchedulerConfig
    num_blocks: tuple[int, ...]
    hardware: Hardware
    weights: WeightBytes
    weight_format: str

    def floor(
        self, workload: Workload, *, max_output_tokens: int | None = None, policy: PolicyName | None = None
    ) -> VirtualRun:
        """The workload through this scheduler if every step took what its bytes and operations must take."""
        config = self.config if policy is None else replace(self.config, policy=policy)
        return simulate(
            workload,
            self.spec.vocab_size,
            config,
            self.num_blocks,
            [group.window for group in self.spec.kv_groups],
            FloorCost(self.spec, self.hardware, self.dtype, self.weights),
            max_output_tokens=max_output_tokens,
        )

    def check(self, workload: Workload) -> None:
        """ConfigError when a request of the workload is longer than a sequence may be."""
        longest = max(request.prompt_len + request.output_len for request in workload.requests)
        if longest > self.config.max_model_len:
            raise ConfigError(
                f"workload {workload.name} has a request of {longest} tokens and the engine serves up to "
                f"{self.config.max_model_len}: cut the lengths (--max-input-len, --max-output-len), or raise "
                "--max-model-len or --kv-cache-bytes"
            )


def subject_of(llm: LLM, *, again: bool = False) -> Subject:
    """Measures the machine (about a second) the first time, and once more if ``again``."""
    assembly, scheduler = llm.assembly, llm.assembly.engine.scheduler
    return Subject(
        assembly.files.name,
        llm.spec,
        assembly.dtype,
        replace(scheduler.config, max_model_len=assembly.max_model_len),
        assembly.engine.executor.num_blocks,
        measure_hardware(again=again),
        kept_weights(llm),
        assembly.weight_format,
    )


def kept_weights(llm: LLM) -> WeightBytes:
    """What a step reads of the weights as this engine keeps them, quantised or not."""
    executor = llm.assembly.engine.executor
    if not isinstance(executor, LocalExecutor | OverlappedExecutor):
        return WeightBytes.in_dtype(llm.spec, llm.assembly.dtype)
    model = executor.runner.model
    assert model.embedding is not None, "one process holds the whole model"
    assert model.head is not None, "one process holds the whole model"
    table, head = model.embedding.tokens.nbytes, model.head.linear.nbytes
    positions = 0 if model.embedding.positions is None else model.embedding.positions.nbytes
    return WeightBytes(model.weight_bytes - table - positions - head, head, table / llm.spec.vocab_size)


def subject_after(llm: LLM, before: Subject, say: Callable[[str], None]) -> Subject:
    """Measures the machine once more: the floor may not be what it gave in a busy moment before the run."""
    after = subject_of(llm, again=True)
    if not after.hardware.exceeds(before.hardware, NOTABLY):
        return before
    say(f"the machine gave more after the run, so the floor moves: {after.hardware}")
    return after


def virtual_subject(options: EngineOptions) -> Subject:
    """The same without loading weights: the cache gets what a real engine would be given here and now."""
    import torch

    from foretell.memory import default_kv_bytes
    from foretell.model.load import resolve_dtype, spec_for
    from foretell.options import scheduler_config
    from foretell.store import resolve
    from foretell.worker.kv import plan_blocks

    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    files = resolve(options.model, offline=options.offline)
    spec, dtype = spec_for(files), resolve_dtype(options.dtype, files)
    config = scheduler_config(options, options.max_model_len or spec.max_position_embeddings)
    kv_bytes = options.kv_cache_bytes or default_kv_bytes()
    num_blocks = plan_blocks(spec, config, kv_bytes, dtype.itemsize)
    name = str(dtype).removeprefix("torch.")
    return Subject(
        files.name, spec, name, config, num_blocks, measure_hardware(), WeightBytes.in_dtype(spec, name), name
    )


def greedy_params(workload: Workload, max_output_tokens: int | None = None) -> list[SamplingParams]:
    """Exactly the asked number of tokens from each request: greedy, whatever end-of-sequence the model says."""
    made: dict[int, SamplingParams] = {}
    params = []
    for request in workload.requests:
        length = min(request.output_len, max_output_tokens or request.output_len)
        if length not in made:
            made[length] = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        params.append(made[length])
    return params


def prompts_of(workload: Workload, vocab_size: int, variant: int = 0) -> list[Sequence[int]]:
    return [workload.token_ids(i, vocab_size, variant=variant) for i in range(len(workload.requests))]


def describe(subject: Subject, workload: Workload, kernels: str) -> dict[str, Any]:
    """What was measured on what, for the JSON line."""
    config = subject.config
    return {
        "model": subject.name,
        "dtype": subject.dtype,
        "weight_format": subject.weight_format,
        "weight_bytes_read_per_step": subject.weights.layers + subject.weights.head,
        "kernels": kernels,
        "hardware": subject.hardware.as_dict(),
        "workload": workload.name,
        "requests": len(workload.requests),
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "policy": config.policy,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": config.max_model_len,
        "block_size": config.block_size,
        "num_blocks": list(subject.num_blocks),
        "prefix_caching": config.enable_prefix_caching,
    }


def heading(subject: Subject, workload: Workload, kernels: str, say: Callable[[str], None]) -> None:
    say(
        f"{subject.name}, {subject.weight_format} weights, {subject.dtype} cache, {kernels} kernels, "
        f"policy {subject.config.policy}, prefix cache {'on' if subject.config.enable_prefix_caching else 'off'}"
    )
    say(f"machine: {subject.hardware}")
    say(
        f"workload {workload.name}: {workload.description} "
        f"({workload.prompt_tokens:,} prompt tokens, {workload.output_tokens:,} output tokens)"
    )
