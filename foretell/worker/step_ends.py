"""What comes before and after the model in a step, as a device does it best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.worker.device_sampler import greedy_tokens
from foretell.worker.step_buffers import StepBuffers, StepLayout, unpack_torch

Unpack = Callable[[StepBuffers, StepLayout, int, Sequence[int] | None], None]
Greedy = Callable[[StepBuffers, StepLayout, Tensor], None]


@dataclass(frozen=True, slots=True)
class StepEnds:
    """``unpack``: staged words → static buffers. ``greedy``: logits [S, vocab] → ``sampled`` and ``last_token``."""

    unpack: Unpack
    greedy: Greedy


def greedy_torch(buffers: StepBuffers, layout: StepLayout, logits: Tensor) -> None:
    sampled = buffers.sampled[: layout.num_seqs]
    sampled.copy_(greedy_tokens(logits))
    buffers.last_token.index_copy_(0, buffers.staging[layout.slots].long(), sampled)


def step_ends(device: torch.device) -> StepEnds:
    """In Triton on a GPU, in torch elsewhere."""
    if device.type != "cuda":
        return StepEnds(unpack_torch, greedy_torch)
    from foretell.kernels.triton_step import greedy_triton, unpack_triton

    return StepEnds(unpack_triton, greedy_triton)
