"""Sampling where the logits are: the CPU sampler's arithmetic on whole tensors, without waiting for the device.

What needs the tokens' values on the CPU (penalties, bans, masks, log-probabilities) is not done here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foretell.core.params import SamplingParams
from foretell.worker.sampler import CANDIDATES, draw_at, keep_likeliest, uniform

ROWS_AT_ONCE = 64  # bounds the memory of a pass over [rows, vocab]
_FIELDS = 6  # row, temperature, top_k, top_p, min_p, uniform number


class DrawPlan:
    """Rows of a step that draw their token, as a [6, R] block of float64 that travels in one copy."""

    def __init__(self, max_rows: int, device: torch.device, *, in_flight: int) -> None:
        pinned = device.type == "cuda"
        self.device = torch.zeros(_FIELDS * max_rows, dtype=torch.float64, device=device)
        self.host = [
            torch.zeros(_FIELDS * max_rows, dtype=torch.float64, pin_memory=pinned) for _ in range(in_flight)
        ]

    def send(self, ring: int, rows: list[tuple[int, SamplingParams, int]], vocab: int) -> tuple[Tensor, int]:
        """rows: (row of the logits, parameters, output index) → [6, R] on the device, and how many of the likeliest
        tokens truncation must look at (0: none of the rows truncates)."""
        count, width = len(rows), 0
        values = np.empty((_FIELDS, count), dtype=np.float64)
        for i, (row, p, index) in enumerate(rows):
            cut = 0 < p.top_k < vocab
            values[:, i] = (
                row,
                max(p.temperature, 1e-4),
                p.top_k if cut else vocab,
                p.top_p,
                p.min_p,
                uniform(p.seed or 0, index),
            )
            if cut and p.top_k <= CANDIDATES:
                width = max(width, min(vocab, CANDIDATES))
            elif cut or p.top_p < 1:
                width = vocab
        host = self.host[ring][: values.size]
        host.numpy()[:] = values.ravel()
        device = self.device[: values.size]
        device.copy_(host, non_blocking=True)
        return device.view(_FIELDS, count), width


def draw_tokens(logits: Tensor, plan: Tensor, width: int) -> Tensor:
    """logits [S, vocab], plan [6, R] → tokens [R] int64; -1 where a row's logits are not finite."""
    parts = [
        _draw_some(logits, plan[:, at : at + ROWS_AT_ONCE], width) for at in range(0, plan.shape[1], ROWS_AT_ONCE)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_some(logits: Tensor, plan: Tensor, width: int) -> Tensor:
    rows, temperature, top_k, top_p, min_p, u = plan
    scaled = logits.index_select(0, rows.long()).float() / temperature.float()[:, None]
    finite = torch.isfinite(scaled.amax(dim=-1))
    probs = torch.softmax(scaled, dim=-1)
    floor = min_p.to(probs.dtype)[:, None] * probs.amax(dim=-1, keepdim=True)
    probs = torch.where(probs >= floor, probs, 0.0)
    if width:
        cut = (top_k < logits.shape[-1]) | (top_p < 1)
        kept, _ = keep_likeliest(probs, top_k.long(), top_p, width)
        probs = torch.where(cut[:, None], kept, probs)
    return torch.where(finite, draw_at(probs, u), -1)


def greedy_tokens(logits: Tensor) -> Tensor:
    """logits [S, vocab] → likeliest tokens [S] int64, the first among equals; -1 where the maximum is not finite."""
    best, tokens = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), tokens, -1)
