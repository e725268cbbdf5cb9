"""Linear layers of every backend against float64, and the C++ one's promise: a row never feels its batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import ConfigError
from foretell.kernels import Kernels, get_kernels
from foretell.kernels.cpu import CpuKernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _poison():
    """In this mode torch.empty returns NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def backend(name: str) -> Kernels:
    try:
        return get_kernels(name)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return backend(request.param)


@pytest.fixture(scope="module")
def cpu() -> CpuKernels:
    kernels = backend("cpu")
    assert isinstance(kernels, CpuKernels)
    return kernels


def problem(M: int, N: int, K: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*shape, generator=generator) for shape in ((M, K), (N, K), (N,)))
    return x, w.to(dtype), b


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, tolerance: float) -> None:
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T + 1e-3
    if b is not None:
        exact, size = exact + b.double(), size + b.double().abs()
    assert ((y.double() - exact).abs() / size).max() < tolerance


@given(
    M=st.integers(1, 40), N=st.integers(1, 130), K=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_matches_float64(kernels, M, N, K, dtype, bias, seed):
    x, w, b = problem(M, N, K, dtype, seed)
    y = kernels.pack_linear(w, b if bias else None)(x)
    assert y.shape == (M, N)
    assert y.dtype == torch.float32
    # The reference may round activations to the weight's bfloat16.
    tolerance = 1e-2 if kernels.name == "reference" and dtype == torch.bfloat16 else 1e-6
    check(y, x, w, b if bias else None, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 960, 577), (200, 70, 2000), (700, 33, 100), (5, 64, 5000), (0, 8, 8)])
def test_blocks_and_edges(cpu, dtype, M, N, K):
    x, w, b = problem(M, N, K, dtype)
    y = cpu.pack_linear(w, b)(x)
    if M:
        check(y, x, w, b, 2e-6)
    assert y.shape == (M, N)


def test_strided_inputs(kernels):
    x, w, b = problem(6, 40, 90, torch.float32)
    wide = torch.zeros(6, 200)
    wide[:, 7:97] = x
    tall = torch.zeros(40, 120)
    tall[:, :90] = w
    for layer in (kernels.pack_linear(tall[:, :90], b), kernels.pack_linear(w.T.contiguous().T, b)):
        check(layer(wide[:, 7:97]), x, w, b, 1e-6)
        check(layer(x.T.contiguous().T), x, w, b, 1e-6)


def test_other_activation_types_keep_their_dtype(kernels):
    x, w, b = problem(3, 8, 16, torch.float32)
    y = kernels.pack_linear(w, b)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    check(y, x, w, b, 3e-2)


def test_the_layer_owns_its_weight(kernels):
    x, w, b = problem(3, 8, 16, torch.float32)
    layer = kernels.pack_linear(w, b)
    before = layer(x)
    w.zero_()
    b.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [63, 576, 1601])
def test_a_row_does_not_depend_on_batch_or_threads(cpu, dtype, K):
    x, w, b = problem(400, 100, K, dtype)
    layer = cpu.pack_linear(w, b)
    whole = layer(x)
    for size in (1, 2, 3, 7, 14, 15, 40, 169):
        pieces = torch.cat([layer(piece) for piece in x.split(size)])
        assert torch.equal(pieces, whole), size
    try:
        for threads in (1, 3):
            cpu.set_threads(threads)
            assert torch.equal(layer(x), whole)
            assert torch.equal(layer(x[:1]), whole[:1])
    finally:
        cpu.set_threads(torch.get_num_threads())


def test_special_numbers_pass(cpu):
    for dtype in DTYPES:
        w = torch.tensor([[6e-8, 65504.0, float("inf"), 1.0]]).T.to(dtype).contiguous()
        y = cpu.pack_linear(w, None)(torch.ones(1, 1))
        assert torch.equal(y[0], w[:, 0].float())


@pytest.mark.slow
def test_bfloat16_dot_products_round_activations_only_where_allowed(tmp_path):
    """The path of CPUs with such instructions, emulated; it builds the kernels anew."""
    code = """
import torch
from foretell.kernels import get_kernels
x, w = torch.randn(40, 577), torch.randn(70, 577).bfloat16()
exact, rounded = x.double() @ w.double().T, x.bfloat16().double() @ w.double().T
error = lambda y, e: float(((y - e).abs() / (x.double().abs() @ w.double().abs().T)[: len(y)]).max())
fast = get_kernels("cpu").pack_linear(w, None)
slow = get_kernels("cpu", batch_invariant=True).pack_linear(w, None)
assert error(fast(x), rounded) < 1e-6 < error(fast(x), exact)
assert torch.equal(torch.cat([fast(p) for p in x.split(8)]), fast(x))
assert error(fast(x[:5]), exact[:5]) < 1e-6
assert error(slow(x), exact) < 1e-6
assert torch.equal(torch.cat([slow(p) for p in x.split(1)]), slow(x))
"""
    flags = "-march=native -DFORETELL_EMULATE_DOT"
    environment = {**os.environ, "FORETELL_HOME": str(tmp_path), "FORETELL_CXXFLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
