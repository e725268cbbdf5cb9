"""A step that has been submitted to a device, and its results once they are back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foretell.core.messages import Batch, ChunkResult
from foretell.worker.pooling import embedding_of
from foretell.worker.sampler import Sampler
from foretell.worker.state import RequestState

NOT_FINITE = "the model's logits are not finite: the weights or the dtype are unsuitable"


@dataclass(slots=True)
class Step:
    """A step that has been submitted: what its results will be made of."""

    batch: Batch
    states: list[RequestState]  # one per chunk
    sampled: Tensor  # [S] pinned; -1: not finite. Valid once ``ready``
    on_cpu: list[int] = field(default_factory=list)  # rows whose token the CPU chooses, from ``logits``
    logits: Tensor | None = None  # [len(on_cpu), vocab] float32, pinned
    ready: torch.cuda.Event | None = None
    launched_seconds: float = 0.0  # CPU time of submit


def results_of(step: Step, sampler: Sampler) -> list[ChunkResult]:
    """Of chunks that sample, in batch order; ``step`` is ready. Its requests have taken them in."""
    chosen: dict[int, ChunkResult] = {}
    if step.logits is not None:
        states = [step.states[row] for row in step.on_cpu]
        chosen = dict(zip(step.on_cpu, sampler(step.logits, states), strict=True))
    results = []
    for row, (chunk, state, token) in enumerate(
        zip(step.batch.chunks, step.states, step.sampled.tolist(), strict=True)
    ):
        if not chunk.sample:
            continue
        if state.params.pooling is not None:
            result = ChunkResult(state.id, embedding=embedding_of(state))
        elif row in chosen:
            result = chosen[row]
        else:
            result = ChunkResult(state.id, token) if token >= 0 else ChunkResult(state.id, error=NOT_FINITE)
        state.take(result)
        if state.prompt_logprobs_due:
            result.prompt_logprobs = state.prompt_logprobs
            state.prompt_logprobs_due = False
        results.append(result)
    return results
