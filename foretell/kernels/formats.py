"""Weights in fewer bits than they came with: how a matrix is turned into codes and scales, in plain torch.

A format is one class here; the GPU's kernels read what its fields say. Nothing is calibrated: each weight is rounded
to the nearest code, so a model can be quantised while it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ROWS_AT_ONCE = 4096  # of a matrix: bounds the memory of the float32 steps between


@dataclass(slots=True)
class Codes:
    """A quantised matrix of N rows."""

    codes: Tensor  # [N, bytes per row]
    scales: Tensor  # what codes are multiplied by

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


class WeightFormat(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def group(self) -> int:
        """Weights of a row that share a scale; 0: the whole row."""
        ...

    @property
    def activations(self) -> torch.dtype | None:
        """What many rows are rounded to for the product; None: nothing."""
        ...

    def quantise(self, weight: Tensor) -> Codes:
        """weight [N, K] of any float dtype, on any device."""
        ...

    def dequantise(self, codes: Codes, K: int) -> Tensor:
        """[N, K] float32: exactly what the codes mean."""
        ...


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale for each row, codes of 8 bits: w ≈ code · max|row| / largest."""

    name: str
    dtype: torch.dtype
    largest: float
    activations: torch.dtype | None = None
    group: int = 0

    def quantise(self, weight: Tensor) -> Codes:
        """Codes [N, K], scales [N] float32."""
        codes = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scales = torch.empty(len(weight), device=weight.device)
        for at in range(0, len(weight), ROWS_AT_ONCE):
            rows = weight[at : at + ROWS_AT_ONCE].float()
            scale = (rows.abs().amax(dim=1) / self.largest).clamp(min=1e-30)
            scales[at : at + ROWS_AT_ONCE] = scale
            rows = rows / scale[:, None]
            codes[at : at + ROWS_AT_ONCE] = rows if self.dtype.is_floating_point else rows.round()
        return Codes(codes, scales)

    def dequantise(self, codes: Codes, K: int) -> Tensor:
        return codes.codes.float() * codes.scales[:, None]


@dataclass(frozen=True, slots=True)
class PerGroup:
    """Codes 0 … 15 with a scale for each ``group`` of a row: w ≈ (code - 8) · scale.

    A byte holds a weight of one group and, in its upper half, the one at the same place of the next group, so that
    a tile of bytes is two tiles of whole groups. Rows are filled up with zeros to pairs of groups. Code 0 is the
    weight of the largest size, which may make the scale negative, or beyond it, whatever ``factors`` leave the least
    squared error. One zero for all: a zero for each group would be one more operand between memory and product.
    """

    name: str = "int4"
    group: int = 128
    activations: torch.dtype | None = None
    factors: tuple[float, ...] = (1.0, 8 / 7, 0.93, 0.87, 0.8)  # of the scale at which code 0 is that weight

    def quantise(self, weight: Tensor) -> Codes:
        """Codes [N, pairs · group] uint8; scales [groups, N] bfloat16."""
        (N, K), device = weight.shape, weight.device
        pairs = -(-K // (2 * self.group))
        codes = torch.empty(N, pairs * self.group, dtype=torch.uint8, device=device)
        scales = torch.empty(2 * pairs, N, dtype=torch.bfloat16, device=device)
        for at in range(0, N, ROWS_AT_ONCE):
            part = slice(at, at + ROWS_AT_ONCE)
            rows = torch.nn.functional.pad(weight[part].float(), (0, 2 * pairs * self.group - K))
            code, scale = self._rounded(rows.view(len(rows), 2 * pairs, self.group))
            code = code.view(len(rows), pairs, 2, self.group)
            codes[part] = (code[:, :, 0] | code[:, :, 1] << 4).flatten(1)
            scales[:, part] = scale.T
        return Codes(codes, scales)

    def _rounded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n, groups, group] → codes and scale of each group, the best of all factors."""
        low, high = rows.amin(dim=2), rows.amax(dim=2)
        largest = torch.where(-low > high, low, high)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for factor in self.factors:
            scale = (largest * (-factor / 8)).bfloat16()
            scale = torch.where(scale == 0, 1e-30, scale)
            wide = scale.float()[:, :, None]
            code = (rows / wide).round_().clamp_(-8, 7)
            error = (code * wide).sub_(rows).square_().sum(dim=2)
            found = (error, (code + 8).byte(), scale)
            if best is not None:
                better = error < best[0]
                found = (
                    torch.where(better, error, best[0]), torch.where(better[:, :, None], found[1], best[1]),
                    torch.where(better, scale, best[2]),
                )  # fmt: skip
            best = found
        assert best is not None
        return best[1], best[2]

    def dequantise(self, codes: Codes, K: int) -> Tensor:
        N = len(codes.codes)
        pairs = codes.codes.view(N, -1, 1, self.group)
        code = torch.cat((pairs & 15, pairs >> 4), dim=2).view(N, -1, self.group).float()
        whole: Tensor = ((code - 8) * codes.scales.T[:, :, None].float()).reshape(N, -1)
        return whole[:, :K]


FORMATS: dict[str, WeightFormat] = {
    "int8": PerChannel("int8", torch.int8, 127),
    "int4": PerGroup(),
    "fp8": PerChannel("fp8", torch.float8_e4m3fn, 448, activations=torch.float8_e4m3fn),
}
