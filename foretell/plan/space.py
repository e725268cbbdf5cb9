"""Everything that may be chosen, in order: the plain first, so that what is equal goes to the plainer one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from foretell.config import ModelSpec, PolicyName, SchedulerConfig
from foretell.options import EngineOptions, scheduler_config
from foretell.plan.machine import Machine

POLICIES: tuple[PolicyName, ...] = ("mixed", "prefill-first", "decode-first")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration: a layout, a scheduler's limits, shares of memory. ``weights`` names how they are kept."""

    weights: str
    tp: int
    pp: int
    replicas: int
    policy: PolicyName
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    kv_share: float  # of a CPU's free memory for keys and values; of a GPU's memory for everything
    enable_prefix_caching: bool

    @property
    def ranks(self) -> int:
        """Ranks of all replicas: devices, on GPUs."""
        return self.tp * self.pp * self.replicas

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.tp, self.pp, self.replicas

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        chunk = f", chunks of {self.max_chunk_tokens}" if self.max_chunk_tokens else ""
        cache = "" if self.enable_prefix_caching else ", no prefix cache"
        return (
            f"tp={self.tp} pp={self.pp} replicas={self.replicas}, {self.policy}, {self.max_num_seqs} sequences, "
            f"{self.max_num_batched_tokens} tokens a step{chunk}, KV share {self.kv_share:g}, {self.weights}{cache}"
        )


@dataclass(frozen=True, slots=True)
class Choices:
    """The values that each choice may take; layouts are (tp, pp, replicas)."""

    weights: tuple[str, ...]
    layouts: tuple[tuple[int, int, int], ...]
    policies: tuple[PolicyName, ...] = POLICIES
    max_num_seqs: tuple[int, ...] = (64, 32, 16, 8)
    max_num_batched_tokens: tuple[int, ...] = (2048, 1024, 512, 256)
    chunk_parts: tuple[int, ...] = (1, 4)  # a prompt's chunk is at most the budget over this
    kv_shares: tuple[float, ...] = (0.3, 0.6)
    prefix_caching: tuple[bool, ...] = (True, False)


def usual_choices(machine: Machine, weights: Sequence[str]) -> Choices:
    """What is worth a look on these devices."""
    layouts = tuple(all_layouts(machine.count if not machine.is_cpu else 2))
    if machine.is_cpu:
        return Choices(tuple(weights), layouts)
    return Choices(
        tuple(weights),
        layouts,
        max_num_seqs=(256, 512, 128, 64, 32),
        max_num_batched_tokens=(8192, 2048, 512),
        kv_shares=(0.9,),
    )


def all_layouts(most: int) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, replicas) with at most so many ranks, fewest first; legal or not."""
    found = [
        (tp, pp, replicas)
        for tp in range(1, most + 1)
        for pp in range(1, most // tp + 1)
        for replicas in range(1, most // (tp * pp) + 1)
    ]
    yield from sorted(found, key=lambda layout: (layout[0] * layout[1] * layout[2], layout[0] * layout[1], layout[1]))


def candidates(choices: Choices) -> list[Candidate]:
    """All combinations, in the order of the choices; the layout changes last."""
    found = []
    for layout, weights, caching, share, policy, seqs, tokens, part in product(
        choices.layouts,
        choices.weights,
        choices.prefix_caching,
        choices.kv_shares,
        choices.policies,
        choices.max_num_seqs,
        choices.max_num_batched_tokens,
        choices.chunk_parts,
    ):
        tp, pp, replicas = layout
        chunk = 0 if part == 1 else max(1, tokens // part)
        found.append(Candidate(weights, tp, pp, replicas, policy, seqs, tokens, chunk, share, caching))
    return found


def config_of(candidate: Candidate, spec: ModelSpec, machine: Machine, max_model_len: int | None) -> SchedulerConfig:
    """The scheduler's configuration that the engine would make of it."""
    options = EngineOptions(
        model="planned",
        policy=candidate.policy,
        max_num_seqs=candidate.max_num_seqs,
        max_num_batched_tokens=candidate.max_num_batched_tokens,
        max_chunk_tokens=candidate.max_chunk_tokens,
        enable_prefix_caching=candidate.enable_prefix_caching,
    )
    length = max_model_len or spec.max_position_embeddings
    return scheduler_config(options, length, "cpu" if machine.is_cpu else "cuda")
