"""Linear layers on a GPU: kernels of ours where reading the weights is what takes the time, cuBLAS above."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.kernels import cuda_tuning, triton_gated, triton_linear
from foretell.kernels.cublaslt import ALIGNMENT, ManyRows
from foretell.kernels.triton_common import (
    Scratch,
    is_hopper,
    launch,
    num_multiprocessors,
    set_descriptor_memory,
    shared_bytes,
)

MANY_ROWS = 1024  # from here on it is bound by the matrix unit, and by the card's power
# Up to here many rows of [gate; up] are faster with the activation in the same kernel (282 µs, not 317, for 16384 of
# Qwen 3 0.6B); above, the library's product is so much faster that its activation may follow
SHORT_ROWS = 2048


def precision(x: Tensor) -> str:
    """Of a Triton dot: full for float32, where the default would round to tf32."""
    return "ieee" if x.dtype is torch.float32 else "tf32"


class CudaLinear:
    """A weight [N, K] as it came; the kernel is chosen by the number of rows, or for ``invariant`` always one."""

    __slots__ = ("bias", "in_features", "invariant", "out_features", "scratch", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, scratch: Scratch, invariant: bool) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight.detach().contiguous()
        self.bias = None if bias is None else bias.detach().to(weight.device, torch.float32)
        self.scratch, self.invariant = scratch, invariant

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            if (many := self._many_rows(x)) is not None:
                return many(x, self.weight)
            bias = None if self.bias is None else self.bias.to(self.weight.dtype)
            return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)
        return self.launch(x, "")

    def into(self, x: Tensor, out: Tensor) -> None:
        """The same, written to ``out`` [M, N]."""
        if self.takes(x):
            self.launch(x, "", out)
        elif self.bias is None and x.dtype is self.weight.dtype:
            torch.mm(x, self.weight.t(), out=out)
        else:
            out.copy_(self(x))

    def _many_rows(self, x: Tensor) -> ManyRows | None:
        """What takes this product, if it is a large one and lies in memory as it wants it."""
        return self.scratch.many_rows(x.device) if self._large(x) else None

    def _large(self, x: Tensor) -> bool:
        """Whether it is a product of many rows, all of them where the copy engine can take them from."""
        if len(x) < MANY_ROWS or self.bias is not None or x.dtype is not torch.bfloat16:
            return False
        even = self.in_features % 8 == 0 and self.out_features % 8 == 0
        aligned = x.is_contiguous() and (x.data_ptr() | self.weight.data_ptr()) % ALIGNMENT == 0
        return even and aligned and self.weight.dtype is x.dtype

    def fuses(self, x: Tensor) -> bool:
        """Whether ``gated_rows`` is for this input."""
        short = self.in_features <= SHORT_ROWS and self.out_features % 16 == 0
        return short and self._large(x) and is_hopper(x.device)

    def gated_rows(self, x: Tensor, kind: str) -> Tensor:
        """As ``launch`` with an activation, for many rows."""
        M, F, device = len(x), self.out_features // 2, x.device
        y = torch.empty(M, F, dtype=x.dtype, device=device)
        how = cuda_tuning.GATED
        tiles = -(-M // how.block_m) * -(-F // how.block_n)
        set_descriptor_memory(device)
        launch(
            triton_gated.gated_rows, (min(tiles, num_multiprocessors(device)),),
            x, self.weight, y, M, F, self.in_features, kind, how.block_m, how.block_n, how.block_k, how.group,
            how.stages, num_warps=how.num_warps, device=device,
        )  # fmt: skip
        return y

    def takes(self, x: Tensor) -> bool:
        """Whether our kernels for few rows are for this input."""
        if self.invariant:
            return x.shape[0] > 0 and x.dtype is self.weight.dtype
        return 0 < x.shape[0] <= self.most_rows and x.dtype is self.weight.dtype and x.element_size() == 2

    @property
    def most_rows(self) -> int:
        """Up to here our kernels are as fast as the library's."""
        return cuda_tuning.most_rows(self.out_features, self.in_features)

    def launch(self, x: Tensor, kind: str, y: Tensor | None = None) -> Tensor:
        """x [M, K] → [M, N], in ``y`` if given; with an activation ``kind``, the weight's rows are [gate; up], and y
        is [M, N/2]."""
        N = self.out_features // 2 if kind else self.out_features
        if y is None:
            y = torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)
        if x.stride(1) != 1:
            x = x.contiguous()
        if len(x) == 1 and not self.invariant:
            units = num_multiprocessors(x.device)
            if (one := cuda_tuning.one_row(N, self.in_features, bool(kind), units)) is not None:
                self._one_row(x, y, kind, one)
                return y
            if not kind and self.bias is None:
                # 139 µs for Gemma's head of 262144 rows of 1152, our tiles 148
                return y if launch.compiling else torch.mm(x, self.weight.t(), out=y)
        self._few_rows(x, y, kind)
        return y

    def _one_row(self, x: Tensor, y: Tensor, kind: str, how: cuda_tuning.OneRow) -> None:
        N = y.shape[1]
        launch(
            triton_linear.one_row, (-(-N // how.block_n),),
            x, self.weight, self.bias, y, N, self.in_features, kind, self.bias is not None, how.block_n, how.block_k,
            num_warps=how.num_warps, device=x.device,
        )  # fmt: skip

    def _few_rows(self, x: Tensor, y: Tensor, kind: str) -> None:
        (M, K), N, device = x.shape, y.shape[1], x.device
        if self.invariant:
            how = cuda_tuning.invariant(N, bool(kind), x.element_size())
        else:
            how = cuda_tuning.few_rows(M, N, K, bool(kind), num_multiprocessors(device))
            how = how.fitted(bool(kind), shared_bytes(device))
        tiles, row_tiles = -(-N // how.block_n), -(-M // how.block_m)
        parts = arrived = None
        if how.splits > 1:
            numbers = (2 if kind else 1) * how.splits * row_tiles * how.block_m * tiles * how.block_n
            parts, arrived = self.scratch.floats(numbers, device), self.scratch.counters(row_tiles * tiles, device)
        once = -(-K // how.block_k) <= how.splits
        launch(
            triton_linear.few_rows, (row_tiles, tiles, how.splits),
            x, x.stride(0), self.weight, self.bias, y, parts, arrived, M, N, K,
            kind, self.bias is not None, precision(x), how.block_m, how.block_n, how.block_k, how.splits > 1,
            how.weights_first, how.masked, once, how.ahead, how.stages, num_warps=how.num_warps, device=device,
        )  # fmt: skip
