"""Products of many rows through cuBLASLt, which for each shape knows more kernels than the one it puts first.

The first is often the fastest on a cool card. One that has been busy for a second runs at its power limit, and there
others win: by 5 % for the layers of Llama 3.1 8B and by 13 % for those of Qwen 3 0.6B at 16384 rows (one H200). torch
leaves no choice, so the library it has loaded is called by ctypes.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20
ALIGNMENT = 256  # bytes, of each matrix: what the library's suggestions take for granted
CANDIDATES = 8  # of the library's suggestions, best first by its own model
PLANS = 512  # shapes remembered
# numbers of the library's C interface
_COMPUTE_32F, _REAL_32F, _REAL_16BF = 68, 0, 14
_TRANSPOSE_A, _MAX_WORKSPACE, _CUSTOM_OPTION = 3, 1, 5
_RESULT_BYTES = 96  # of a heuristic's result, which begins with the algorithm
# Suggestions of these custom options are within 1 % of the best of all eight, over 28 shapes of four models
FASTEST_UNDER_LOAD = (1, 2)


class _Plan:
    """What is the same at every product of a shape."""

    def __init__(self, library: Any, handle: c_void_p, M: int, N: int, K: int) -> None:
        self._library = library
        self.operation, self.weight, self.x, self.y = (c_void_p() for _ in range(4))
        _check(library.cublasLtMatmulDescCreate(byref(self.operation), _COMPUTE_32F, _REAL_32F))
        transposed = c_int32(1)
        _check(library.cublasLtMatmulDescSetAttribute(self.operation, _TRANSPOSE_A, byref(transposed), c_size_t(4)))
        # the library counts by columns: y [M, N] row by row is yᵀ = W · xᵀ there
        for layout, rows, columns in ((self.weight, K, N), (self.x, K, M), (self.y, N, M)):
            _check(
                library.cublasLtMatrixLayoutCreate(
                    byref(layout), _REAL_16BF, c_uint64(rows), c_uint64(columns), c_int64(rows)
                )
            )
        self._results = (c_uint8 * (_RESULT_BYTES * CANDIDATES))()
        found = self._suggested(handle)
        if not found:
            raise RuntimeError("cuBLASLt knows no kernel for this shape")
        self.algorithm = byref(self._results, _RESULT_BYTES * self._choice(found))

    def _suggested(self, handle: c_void_p) -> int:
        library, preference, found = self._library, c_void_p(), c_int()
        _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
        try:
            most = c_size_t(WORKSPACE_BYTES)
            _check(library.cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, byref(most), c_size_t(8)))
            status = library.cublasLtMatmulAlgoGetHeuristic(
                handle, self.operation, self.weight, self.x, self.y, self.y, preference, CANDIDATES,
                self._results, byref(found),
            )  # fmt: skip
            _check(status)
        finally:
            library.cublasLtMatmulPreferenceDestroy(preference)
        return found.value

    def _choice(self, found: int) -> int:
        """Which of the suggestions."""
        return next((i for i in range(found) if self._custom_option(i) in FASTEST_UNDER_LOAD), 0)

    def _custom_option(self, index: int) -> int:
        value, written = c_uint32(), c_size_t()
        self._library.cublasLtMatmulAlgoConfigGetAttribute(
            byref(self._results, _RESULT_BYTES * index), _CUSTOM_OPTION, byref(value), c_size_t(4), byref(written)
        )
        return value.value

    def close(self) -> None:
        for layout in (self.weight, self.x, self.y):
            self._library.cublasLtMatrixLayoutDestroy(layout)
        self._library.cublasLtMatmulDescDestroy(self.operation)


class ManyRows:
    """x [M, K] · w [N, K]ᵀ of bfloat16 on one device, in the current stream."""

    def __init__(self, library: Any, device: torch.device) -> None:
        self._library, self._handle = library, c_void_p()
        _check(library.cublasLtCreate(byref(self._handle)))
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._plans: OrderedDict[tuple[int, int, int], _Plan] = OrderedDict()
        self._one, self._zero = c_float(1.0), c_float(0.0)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """Both contiguous, aligned, of numbers of columns that are multiples of 8."""
        (M, K), N = x.shape, w.shape[0]
        y = torch.empty(M, N, dtype=x.dtype, device=x.device)
        plan = self._plans.get((M, N, K)) or self._planned(M, N, K)
        out, at = c_void_p(y.data_ptr()), c_void_p(self._workspace.data_ptr())
        stream = c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        status = self._library.cublasLtMatmul(
            self._handle, plan.operation, byref(self._one), c_void_p(w.data_ptr()), plan.weight,
            c_void_p(x.data_ptr()), plan.x, byref(self._zero), out, plan.y, out, plan.y, plan.algorithm,
            at, c_size_t(WORKSPACE_BYTES), stream,
        )  # fmt: skip
        _check(status)
        return y

    def _planned(self, M: int, N: int, K: int) -> _Plan:
        if len(self._plans) >= PLANS:
            self._plans.popitem(last=False)[1].close()
        plan = self._plans[M, N, K] = _Plan(self._library, self._handle, M, N, K)
        return plan


def many_rows(device: torch.device) -> ManyRows | None:
    """For Hopper, where the choice was measured; None elsewhere, or where the library is not to be had."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or not torch.version.cuda:
        return None
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
        return ManyRows(library, device)
    except (OSError, RuntimeError):
        return None


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt failed with status {status}")
