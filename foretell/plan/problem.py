"""What is asked of a plan, in one piece: model, traffic, devices, goal. Everything else follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from foretell.config import ModelSpec, SchedulerConfig
from foretell.cost.hardware import BYTES_PER_ELEMENT
from foretell.cost.profile import Profile
from foretell.cost.ranks import StageCost, stage_profile, stage_traffic
from foretell.parallel.layout import Layout, make_layout
from foretell.plan.fleet import Prompts
from foretell.plan.goals import Goal
from foretell.plan.machine import Machine
from foretell.plan.space import Candidate, config_of

BLOCK_SIZE = 16  # the engine's, unless told otherwise
CPU_ACTIVATION_BYTES = 4  # residuals travel as float32 between CPU ranks


@dataclass(frozen=True)
class Problem:
    """``profiles`` and ``weight_bytes`` (all weights of one copy of the model) by how the weights are kept."""

    spec: ModelSpec
    machine: Machine
    goal: Goal
    prompts: Prompts
    profiles: Mapping[str, Profile]
    weight_bytes: Mapping[str, int]
    max_model_len: int | None = None

    @property
    def kv_element_bytes(self) -> int:
        return BYTES_PER_ELEMENT[next(iter(self.profiles.values())).dtype]

    @property
    def activation_bytes(self) -> int:
        return CPU_ACTIVATION_BYTES if self.machine.is_cpu else 2

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(group.window for group in self.spec.kv_groups)

    @cached_property
    def shares_beginnings(self) -> bool:
        """Whether any two prompts begin with the same block."""
        return self.prompts.share_beginnings(BLOCK_SIZE)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest request, its answer included."""
        return max(request.prompt_len + request.output_len for request in self.prompts.workload.requests)

    def config(self, candidate: Candidate) -> SchedulerConfig:
        return config_of(candidate, self.spec, self.machine, self.max_model_len)

    def layout(self, candidate: Candidate) -> Layout:
        """ConfigError where the model cannot be split so."""
        return make_layout(self.spec, candidate.tp, candidate.pp)

    def stage_costs(self, candidate: Candidate, *, factor: float = 1.0) -> list[StageCost]:
        """What a step takes on each stage; new accounts."""
        layout, profile, machine = self.layout(candidate), self.profiles[candidate.weights], self.machine
        parts = candidate.ranks if machine.is_cpu else 1
        return [
            StageCost(
                stage_profile(profile, layout, stage, layer_seconds=machine.layer_seconds, parts=parts),
                layout,
                stage,
                machine.link,
                stage_traffic(self.spec, layout, stage, self.activation_bytes),
                factor=factor,
            )
            for stage in range(layout.pp)
        ]
