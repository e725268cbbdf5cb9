"""The byte ledger of a configuration, before anything is loaded: what a device holds, how many KV blocks fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from foretell.config import ModelSpec, SchedulerConfig
from foretell.errors import ConfigError
from foretell.kv_blocks import block_bytes, plan_blocks
from foretell.parallel.layout import make_layout, rank_parameters, shard_spec
from foretell.plan.problem import Problem
from foretell.plan.space import Candidate

MIB, GIB = 1 << 20, 1 << 30
DRIVER_BYTES = GIB * 3 // 4  # a GPU's driver and context
GRAPH_BYTES = 4 * MIB  # of each captured step, beside its tensors
MOST_OF_A_CPU = 0.9  # of the free memory, for everything


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes of the fullest device by purpose; ``num_blocks`` of each engine."""

    budget_bytes: int
    entries: dict[str, int]
    num_blocks: tuple[int, ...]
    kv_cache_bytes: int  # of all replicas and ranks together

    @property
    def planned_bytes(self) -> int:
        return sum(self.entries.values())


def ledger(problem: Problem, candidate: Candidate) -> Ledger | str:
    """The ledger, or why the configuration does not fit."""
    machine, spec = problem.machine, problem.spec
    budget, entries = _without_kv(problem, candidate)
    here = candidate.ranks if machine.is_cpu else 1  # ranks on one device
    left = budget - sum(entries.values())
    wanted = int(machine.memory_bytes * candidate.kv_share) if machine.is_cpu else left
    if left <= 0 or wanted > left:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in entries.items())
        asked = "a KV cache" if left <= 0 else f"a KV cache of {wanted / GIB:.2f}"
        return f"{asked} does not fit in {budget / GIB:.2f} GiB beside {parts}"
    layout, config = problem.layout(candidate), problem.config(candidate)
    widest = max(len(stage) for stage in layout.stages)
    held = layout.tp * max(1, spec.num_kv_heads // layout.tp)  # KV heads on all shards, replicas included
    engine_bytes = wanted // candidate.replicas if machine.is_cpu else wanted * layout.num_ranks
    # every rank has the same number of blocks: the stage with most layers says how many
    useful = engine_bytes * spec.num_kv_heads // held * spec.num_layers // (widest * layout.pp)
    try:
        num_blocks = plan_blocks(spec, config, useful, problem.kv_element_bytes)
    except ConfigError as error:
        return str(error)
    room = _most_tokens(problem, num_blocks, config.block_size)
    if min(room, config.max_model_len) < problem.longest:
        return f"a request of {problem.longest} tokens does not fit: the KV cache holds {room}"
    shard = shard_spec(spec, layout.tp)
    sizes = block_bytes(shard, config.block_size, problem.kv_element_bytes)
    share = widest / spec.num_layers
    taken = int(sum(n * size for n, size in zip(num_blocks, sizes, strict=True)) * share) * here
    return Ledger(budget, {**entries, "KV cache": taken}, num_blocks, engine_bytes * candidate.replicas)


def _without_kv(problem: Problem, candidate: Candidate) -> tuple[int, dict[str, int]]:
    """(budget, entries) of the fullest device."""
    machine, spec, config = problem.machine, problem.spec, problem.config(candidate)
    layout, here = problem.layout(candidate), candidate.ranks if machine.is_cpu else 1
    counts = rank_parameters(spec, layout)
    whole = rank_parameters(spec, make_layout(spec, 1, 1))[0]
    weights = int(problem.weight_bytes[candidate.weights] * max(counts) / whole)
    activations = activation_bytes(problem, candidate)
    if machine.is_cpu:
        total = int(problem.weight_bytes[candidate.weights] * sum(counts) / whole) * candidate.replicas
        process = problem.profiles[candidate.weights].process_bytes
        entries = {"weights": total, "activations": activations * here, "processes": process * here}
        return int(machine.memory_bytes * MOST_OF_A_CPU), entries
    graphs = ceil(config.max_num_seqs / 8) + 4
    entries = {
        "driver and others": DRIVER_BYTES,
        "weights": weights,
        "activations": activations,
        "graphs": GRAPH_BYTES * graphs,
    }
    return int(machine.memory_bytes * candidate.kv_share), entries


def activation_bytes(problem: Problem, candidate: Candidate) -> int:
    """``step_bytes`` of one rank."""
    shard, config = shard_spec(problem.spec, candidate.tp), problem.config(candidate)
    return step_bytes(replace(shard, vocab_size=problem.spec.vocab_size), config, problem.activation_bytes)


def step_bytes(shard: ModelSpec, config: SchedulerConfig, element_bytes: int) -> int:
    """The most that a step holds beside weights and cache: hidden states, queries, keys and values, the MLP's inner
    width, of every token; logits of every sequence, in float32."""
    heads = (shard.num_heads * 2 + shard.num_kv_heads * 2) * shard.head_dim
    per_token = 4 * shard.hidden_size + heads + 3 * shard.intermediate_size
    logits = 2 * config.max_num_seqs * shard.vocab_size * 4
    tables = config.max_num_seqs * ceil(config.max_model_len / config.block_size) * 4 * len(shard.kv_groups)
    return config.max_num_batched_tokens * per_token * element_bytes + logits + tables


def _most_tokens(problem: Problem, num_blocks: tuple[int, ...], block_size: int) -> int:
    """The longest sequence that has the cache to itself."""
    full = [n for n, window in zip(num_blocks, problem.windows, strict=True) if window is None]
    return min(full) * block_size if full else 1 << 62
