"""Rotary position embedding (Su et al. 2021): tables of cos and sin by position.

Angles are computed in float64, stored as float32. Halves are paired: dims i and i + dim/2 of a head turn
together by position · frequency[i].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foretell.config import RopeSpec

Rotation = tuple[Tensor, Tensor]  # cos, sin, each [M, dim/2] float32


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians per position of each pair, [dim/2] float64: theta^(-2i/dim), then the context extension."""
    base = spec.theta ** -(torch.arange(0, spec.dim, 2, dtype=torch.float64) / spec.dim)
    if spec.freq_divisors:
        return base / torch.tensor(spec.freq_divisors, dtype=torch.float64)
    match spec.scaling:
        case "none":
            return base
        case "linear":
            return base / spec.factor
        case "llama3":
            return _llama3(base, spec)
        case "yarn":
            return _yarn(base, spec)


def _llama3(base: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1's rule: waves that complete few turns within the original context are slowed by ``factor``,
    those that complete many are kept, and in between the two are blended linearly in the number of turns."""
    turns = spec.original_max_position * base / (2 * math.pi)
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    keep = blend.clamp(0, 1)
    return base / spec.factor * (1 - keep) + base * keep


def _yarn(base: Tensor, spec: RopeSpec) -> Tensor:
    """YaRN, "NTK-by-parts" (Peng et al. 2023, section 3.2): the ramp runs over dimensions, from the one
    that completes beta_fast turns within the original context to the one that completes beta_slow."""

    def dimension_of(turns: float) -> float:
        ratio = spec.original_max_position / (turns * 2 * math.pi)
        return spec.dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension_of(spec.beta_fast), dimension_of(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    span = high - low or 0.001
    slow = ((torch.arange(spec.dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return base / spec.factor * slow + base * (1 - slow)


class RotaryTable:
    """cos and sin of every position up to the longest reserved; grows by doubling."""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.cos = torch.empty(0, spec.dim // 2)
        self.sin = torch.empty(0, spec.dim // 2)

    def reserve(self, length: int, device: torch.device) -> None:
        """Make positions 0 … length-1 available on this device."""
        if length <= len(self.cos) and self.cos.device == device:
            return
        rows = max(length, 2 * len(self.cos), 512)
        angles = torch.outer(torch.arange(rows, dtype=torch.float64), inverse_frequencies(self.spec))
        self.cos = (angles.cos() * self.spec.attention_factor).to(device, torch.float32)
        self.sin = (angles.sin() * self.spec.attention_factor).to(device, torch.float32)

    def __call__(self, positions: Tensor) -> Rotation:
        """positions [M] int64, below the reserved length → cos, sin [M, dim/2]."""
        return self.cos[positions], self.sin[positions]
