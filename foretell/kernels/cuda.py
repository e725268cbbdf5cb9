"""The GPU's kernels behind the ``Kernels`` interface: Triton's where fusing or few rows pay, cuBLAS for the rest.

Activations are in the weights' dtype (bfloat16 as a rule). Scratch memory belongs to the backend, so the kernels of
one backend run in one stream. What the kernels do not take goes to the reference ones in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foretell.config import Activation, ModelSpec
from foretell.kernels import triton_elementwise
from foretell.kernels.base import Linear
from foretell.kernels.cuda_attention import CudaAttention
from foretell.kernels.cuda_linear import MANY_ROWS, CudaLinear
from foretell.kernels.cuda_quantised import CudaQuantisedLinear
from foretell.kernels.cuda_tuning import power_of_two
from foretell.kernels.formats import FORMATS
from foretell.kernels.triton_common import launch


class CudaKernels(CudaAttention):
    """One device, one stream.

    ``batch_invariant``: a row's result does not depend on the rows beside it nor on the chunk it came in. Products
    and attention then take one path, with fixed tiles and one order of summation, for any number of rows.
    """

    name = "cuda"
    defers_sums = True

    def set_threads(self, count: int) -> None:
        """Nothing here runs on the CPU."""

    def prepare(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        block_size: int,
        device: torch.device,
        *,
        kv_dtype: torch.dtype,
        quantization: str | None,
    ) -> Callable[[], None]:
        from foretell.kernels.cuda_ahead import compile_ahead

        return compile_ahead(self, spec, dtype, block_size, device, kv_dtype, quantization).result

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return CudaLinear(weight, bias, self.scratch, self.batch_invariant)

    def quantise_linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear | None:
        return CudaQuantisedLinear(weight, bias, FORMATS[name], self.scratch, self.batch_invariant)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        normed = torch.empty_like(x)
        self._norm(x, x, weight, None, normed, normed, eps, False)
        return normed

    def add_rms_norm(
        self, x: Tensor, y: Tensor, weight: Tensor, eps: float, y_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, y = x.contiguous(), y.contiguous()
        normed, sums = torch.empty_like(x), torch.empty_like(x)
        self._norm(x, y, weight, y_weight, normed, sums, eps, True)
        return normed, sums

    def _norm(
        self, x: Tensor, y: Tensor, weight: Tensor, y_weight: Tensor | None, normed: Tensor, sums: Tensor, eps: float,
        add: bool,
    ) -> None:  # fmt: skip
        C = x.shape[-1]
        rows, block, rest, per_warp = x.numel() // max(C, 1), power_of_two(C), 1, 512
        if rows >= MANY_ROWS and not self.batch_invariant:  # no idle lanes, though a second sum to wait for
            block, per_warp = 1 << (C.bit_length() - 1), 256
            rest = power_of_two(max(C - block, 1))
        if rows > 0:
            launch(
                triton_elementwise.rms_norm, (rows,),
                x, y, weight, weight if y_weight is None else y_weight, normed, sums, C, eps, add,
                y_weight is not None, block, rest, num_warps=min(max(block // per_warp, 1), 8), device=x.device,
            )  # fmt: skip

    def gated_activation(self, gate_up: Tensor, kind: Activation) -> Tensor:
        if gate_up.stride(1) != 1:
            gate_up = gate_up.contiguous()
        M, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(M, width, dtype=gate_up.dtype, device=gate_up.device)
        block = min(power_of_two(width), 2048)
        if M > 0:
            launch(
                triton_elementwise.gated_activation, (M, -(-width // block)),
                gate_up, gate_up.stride(0), y, width, kind, block, num_warps=4, device=y.device,
            )  # fmt: skip
        return y

    def gated_linear(self, linear: Linear, x: Tensor, kind: Activation) -> Tensor:
        if isinstance(linear, CudaLinear | CudaQuantisedLinear) and linear.takes(x):
            return linear.launch(x, kind)
        if isinstance(linear, CudaLinear) and linear.fuses(x):
            return linear.gated_rows(x, kind)
        return self.gated_activation(linear(x), kind)
