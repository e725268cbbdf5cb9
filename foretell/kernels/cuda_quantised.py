"""Linear layers on a GPU whose weights are kept in codes of 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.kernels import triton_codes, triton_quantised, triton_quantised_row
from foretell.kernels.cuda_tuning import power_of_two
from foretell.kernels.formats import WeightFormat
from foretell.kernels.triton_common import INTERPRETED, Scratch, launch, num_multiprocessors, shared_bytes

ROUNDED_FROM, EXPANDED_FROM = 65, 257  # rows from which a product in codes, or of expanded weights, is the faster


@dataclass(frozen=True, slots=True)
class Tiles:
    block_m: int
    block_n: int
    block_k: int  # of codes' bytes; for groups, the group
    splits: int
    stages: int
    num_warps: int

    def fitted(self, gated: bool, group: int, shared_bytes: int) -> Tiles:
        """With as many stages as the device's shared memory holds."""
        stage = self.block_k * (self.block_n * (2 if gated else 1) + 2 * self.block_m) * (2 if group else 1)
        return replace(self, stages=max(1, min(self.stages, shared_bytes // stage)))


def tiles(M: int, N: int, K: int, gated: bool, group: int, multiprocessors: int) -> Tiles:
    """K is split until every multiprocessor has programs enough to keep reads on their way."""
    block_m = 16 if M <= 16 else 32
    columns, splits = -(-N // 64), 1
    most = (4 if K > 8192 else 3.3) * multiprocessors
    while block_m >= M and columns * splits * 2 <= most and 512 * splits < K and splits < 8:
        splits *= 2
    return Tiles(block_m, 64, group or (256 if K > 1024 else 128), splits, 3, 4)


def one_row(N: int, K: int, gated: bool, whole_numbers: bool) -> Tiles:
    """A program takes block_n rows of the weight, block_k codes of each at once. Whole numbers take longer to become
    floats, so the matrix unit (block_m > 1) is faster at [gate; up] and long rows: 40 µs, not 47 (e4m3: 38)."""
    if K < 2048:
        return Tiles(1, 8, power_of_two(K, 16), 1, 1, 4)
    if gated and whole_numbers:
        return Tiles(16, 64, 256, 1, 3, 8)
    if K > 8192 and whole_numbers:
        return Tiles(16, 128, 128, 8, 3, 4)
    return Tiles(1, 8, 1024, 1, 1, 4) if N <= 4096 else Tiles(1, 2, 2048, 1, 1, 4)


class CudaQuantisedLinear:
    """A weight [N, K] in a format of foretell.kernels.formats.

    Few rows are multiplied with the codes as they are read, and stay as exact as they came. Many are rounded to the
    format's own activations, a scale each, where it has such, or else the weight is expanded for them first.
    ``invariant``: one path with fixed tiles for any number of rows.
    """

    __slots__ = ("bias", "codes", "dtype", "format", "in_features", "invariant", "out_features", "scratch")

    def __init__(
        self, weight: Tensor, bias: Tensor | None, kept_as: WeightFormat, scratch: Scratch, invariant: bool
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype, self.format = weight.dtype, kept_as
        self.codes = kept_as.quantise(weight.detach())
        self.bias = None if bias is None else bias.detach().to(weight.device, torch.float32)
        self.scratch, self.invariant = scratch, invariant

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self.takes(x):
            return self.launch(x, "")
        if len(x) >= ROUNDED_FROM and self.rounds and x.dtype is torch.bfloat16:
            return self._rounded(x)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return F.linear(x.to(self.dtype), self.expanded(), bias).to(x.dtype)

    def takes(self, x: Tensor) -> bool:
        """Whether the codes themselves are multiplied with this input."""
        most = ROUNDED_FROM if self.rounds else EXPANDED_FROM
        return len(x) > 0 and x.element_size() == 2 and (self.invariant or len(x) < most)

    @property
    def rounds(self) -> bool:
        """Whether many rows are rounded for the product: in steps of 16, as cuBLAS wants it."""
        return self.format.activations is not None and self.in_features % 16 == 0 and self.out_features % 16 == 0

    def launch(self, x: Tensor, kind: str, how: Tiles | None = None) -> Tensor:
        """x [M, K] → [M, N]; with an activation ``kind``, the weight's rows are [gate; up], and y is [M, N/2].
        ``how``: other tiles than the table's."""
        (M, K), device = x.shape, x.device
        N = self.out_features // 2 if kind else self.out_features
        y = torch.empty(M, N, dtype=x.dtype, device=device)
        if x.stride(1) != 1:
            x = x.contiguous()
        how = how or self.tiles(M, N, bool(kind), device)
        if how.block_m == 1:
            launch(
                triton_quantised_row.one_quantised_row, (-(-N // how.block_n),),
                x, self.codes.codes, self.codes.scales, self.bias, y, N, K, kind, self.bias is not None,
                how.block_n, how.block_k, num_warps=how.num_warps, device=device,
            )  # fmt: skip
            return y
        columns = -(-N // how.block_n)
        parts = arrived = y
        if how.splits > 1:
            numbers = (2 if kind else 1) * how.splits * how.block_m * columns * how.block_n
            parts, arrived = self.scratch.floats(numbers, device), self.scratch.counters(columns, device)
        launch(
            triton_quantised.quantised_rows, (columns, how.splits, -(-M // how.block_m)),
            x, x.stride(0), self.codes.codes, self.codes.scales, self.bias, y, parts, arrived, M, N, K,
            kind, self.bias is not None, self.format.group, x.dtype is torch.bfloat16 and not INTERPRETED,
            how.block_m, how.block_n, how.block_k, how.splits > 1, how.stages, num_warps=how.num_warps, device=device,
        )  # fmt: skip
        return y

    def tiles(self, M: int, N: int, gated: bool, device: torch.device) -> Tiles:
        units = num_multiprocessors(device)
        if self.invariant:
            return Tiles(32, 64, self.format.group or 128, 1, 3, 4)
        group = self.format.group
        if M == 1 and not group:
            return one_row(N, self.in_features, gated, not self.codes.codes.is_floating_point())
        return tiles(M, N, self.in_features, gated, group, units).fitted(gated, group, shared_bytes(device))

    def expanded(self) -> Tensor:
        """[N, K] in the dtype that the weight came in."""
        N, K, group = self.out_features, self.in_features, self.format.group
        weight = self.codes.codes
        out = torch.empty(N, K, dtype=self.dtype, device=weight.device)
        block_k = group or 256
        step = 2 * group if group else block_k
        launch(
            triton_codes.expand, (-(-N // 32), -(-K // step)),
            weight, self.codes.scales, out, N, K, group, 32, block_k, num_warps=4, device=weight.device,
        )  # fmt: skip
        return out

    def _rounded(self, x: Tensor) -> Tensor:
        """A product of codes with codes: x rounded with a scale for each row."""
        (M, K), device = x.shape, x.device
        codes = torch.empty(M, K, dtype=self.format.activations, device=device)
        scales = torch.empty(M, 1, device=device)
        launch(
            triton_codes.round_rows, (M,),
            x, x.stride(0), codes, scales, K, 448.0, min(power_of_two(K), 4096), num_warps=4, device=device,
        )  # fmt: skip
        y = torch._scaled_mm(
            codes, self.codes.codes.t(), scale_a=scales, scale_b=self.codes.scales[None], out_dtype=x.dtype
        )
        return y if self.bias is None else y + self.bias.to(x.dtype)
