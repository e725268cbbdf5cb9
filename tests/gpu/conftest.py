"""Tests of the GPU's kernels. With TRITON_INTERPRET=1 (and triton installed) small cases also run on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode asks of cuBLAS
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    pytest.importorskip("triton")
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def kernels(device):
    from foretell.kernels.cuda import CudaKernels

    return CudaKernels()


@pytest.fixture
def poison():
    """In this mode torch.empty returns NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
