"""Compiling the kernels a model will need while its weights are still being read.

Triton compiles a kernel at its first launch, a second each; a decode step with its graphs meets some twenty. Here the
same calls are made ahead, in threads whose launches only compile, on tensors that are there for their types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.kernels.base import BatchContext, HeadNorms, KVGroupView, KVLayer
from foretell.kernels.cuda import CudaKernels
from foretell.kernels.cuda_dense import can_be_dense
from foretell.kernels.cuda_linear import MANY_ROWS, CudaLinear
from foretell.kernels.cuda_quantised import CudaQuantisedLinear
from foretell.kernels.formats import FORMATS
from foretell.kernels.triton_common import launch, num_multiprocessors

THREADS = 8
ROWS = (1, 2, 33, 65, 129)  # one for every class of row counts that has kernels of its own
QUANTISED_ROWS = (1, 2, 17)


def compile_ahead(
    kernels: CudaKernels,
    spec: ModelSpec,
    dtype: torch.dtype,
    block_size: int,
    device: torch.device,
    kv_dtype: torch.dtype,
    quantization: str | None,
) -> Future[None]:
    """Done when everything is compiled; raises what a compilation raised."""
    calls = _Calls(kernels, spec, dtype, block_size, device, kv_dtype, quantization).all()

    def compile_all() -> None:
        with ThreadPoolExecutor(
            THREADS, thread_name_prefix="foretell-compile", initializer=_compile_only, initargs=(device,)
        ) as pool:
            for done in [pool.submit(call) for call in calls]:
                done.result()

    with ThreadPoolExecutor(1, thread_name_prefix="foretell-compile") as outer:
        future = outer.submit(compile_all)
        outer.shutdown(wait=False)
    return future


def _compile_only(device: torch.device) -> None:
    if device.index is not None:
        torch.cuda.set_device(device)  # a new thread begins with the first one
    launch.compiling = True


class _Calls:
    def __init__(
        self,
        kernels: CudaKernels,
        spec: ModelSpec,
        dtype: torch.dtype,
        block_size: int,
        device: torch.device,
        kv_dtype: torch.dtype,
        quantization: str | None,
    ) -> None:
        self.kernels, self.spec, self.dtype, self.device = kernels, spec, dtype, device
        self.block_size, self.kv_dtype, self.quantization = block_size, kv_dtype, quantization

    def all(self) -> list[Callable[[], object]]:
        """The slowest to compile first."""
        windows = sorted(set(self.spec.windows), key=lambda w: w or 0)
        calls: list[Callable[[], object]] = []
        for window in windows:
            calls += [partial(self.attend, count, 1, window, ()) for count in self.batches()]
            calls += [partial(self.attend, 1, 128, window, ())]
            if window is not None:  # prompts longer than the window have a kernel of their own
                calls += [partial(self.attend, 1, 128, window, [(0, window + 1)])]
        calls += [partial(self.attend, count, 1, self.spec.windows[-1], (), last=True) for count in self.batches()]
        if self.dtype.itemsize == 2:
            rows = ROWS if self.quantization is None else QUANTISED_ROWS
            calls += [partial(self.linear, *shape, M) for shape in sorted(self.shapes()) for M in rows]
            calls += [partial(self.gated_rows, *shape) for shape in sorted(self.shapes()) if shape[3]]
        return [*calls, self.between, partial(can_be_dense, self.spec.head_dim)]

    def batches(self) -> list[int]:
        """Sequences of a decode batch in each of the classes of cuda_tuning.decode."""
        units, heads = num_multiprocessors(self.device), self.spec.num_kv_heads
        return sorted({-(-pairs // heads) for pairs in (1, units, 2 * units + heads, 4 * units + heads)})

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def shapes(self) -> set[tuple[int, int, bool, bool]]:
        """(N, K, bias, gated) of every linear layer."""
        s, D = self.spec, self.spec.head_dim
        rows = 2 if s.gated_mlp else 1
        return {
            ((s.num_heads + 2 * s.num_kv_heads) * D, s.hidden_size, s.qkv_bias, False),
            (s.hidden_size, s.num_heads * D, s.o_bias, False),
            (rows * s.intermediate_size, s.hidden_size, s.mlp_bias, s.gated_mlp),
            (s.hidden_size, s.intermediate_size, s.mlp_bias, False),
            (s.vocab_size, s.hidden_size, s.lm_head_bias, False),
        }

    def linear(self, N: int, K: int, bias: bool, gated: bool, rows: int) -> None:
        layer = self.layer(N, K, bias)
        if isinstance(layer, CudaQuantisedLinear) or rows <= layer.most_rows:
            layer.launch(self.empty(rows, K), self.spec.activation if gated else "")

    def gated_rows(self, N: int, K: int, bias: bool, gated: bool) -> None:
        layer, x = self.layer(N, K, bias), self.empty(MANY_ROWS, K)
        if isinstance(layer, CudaLinear) and layer.fuses(x):
            layer.gated_rows(x, self.spec.activation)

    def layer(self, N: int, K: int, bias: bool) -> CudaLinear | CudaQuantisedLinear:
        """One that says it is of this shape."""
        vector = self.empty(16, dtype=torch.float32) if bias else None
        layer: CudaLinear | CudaQuantisedLinear
        if self.quantization is None or self.spec.vocab_size == N:
            layer = CudaLinear(self.empty(16, 16), vector, self.kernels.scratch, self.kernels.batch_invariant)
        else:
            kept_as, weight = FORMATS[self.quantization], self.empty(16, 16).zero_()
            layer = CudaQuantisedLinear(weight, vector, kept_as, self.kernels.scratch, self.kernels.batch_invariant)
        layer.in_features, layer.out_features = K, N
        return layer

    def between(self) -> None:
        C = self.spec.hidden_size
        weight = self.empty(C, dtype=torch.float32)
        behind = weight if self.spec.norm_placement == "sandwich" else None
        for x in (self.empty(2, C), self.empty(MANY_ROWS, C)) if self.spec.norm == "rms" else ():
            self.kernels.rms_norm(x, weight, 1e-5)
            self.kernels.add_rms_norm(x, x, weight, 1e-5, behind)
        if self.spec.gated_mlp:
            self.kernels.gated_activation(self.empty(2, 2 * self.spec.intermediate_size), self.spec.activation)

    def attend(
        self, S: int, length: int, window: int | None, chunks: Sequence[tuple[int, int]], *, last: bool = False
    ) -> None:
        """S sequences of ``length`` new tokens; ``last``: as in the last layer."""
        s, M, D = self.spec, S * length, self.spec.head_dim
        heads = self.empty(M, s.num_heads + 2 * s.num_kv_heads, D)
        q, k, v = torch.split(heads, [s.num_heads, s.num_kv_heads, s.num_kv_heads], dim=1)
        norms = None
        if s.qk_norm == "head":
            weight = self.empty(D, dtype=torch.float32)
            norms = HeadNorms(weight, weight, s.norm_eps)
        angles = None if s.rope is None else self.empty(M, s.rope.dim // 2, dtype=torch.float32)
        cache = self.empty(1, s.num_kv_heads, self.block_size, D, dtype=self.kv_dtype)
        integers = partial(self.empty, dtype=torch.int32)
        view = KVGroupView(integers(S, 4096), self.empty(M, dtype=torch.int64))
        context = BatchContext(
            self.empty(M, dtype=torch.int64), integers(S + 1), integers(S), (view,),
            self.block_size, length, length, chunks,
            torch.zeros(S, dtype=torch.int32, device=self.device) if last else None,
        )  # fmt: skip
        rotation = None if angles is None else (angles, angles)
        self.kernels.attend(q, k, v, norms, rotation, KVLayer(cache, cache, 0), context, s.attention_scale, window)
