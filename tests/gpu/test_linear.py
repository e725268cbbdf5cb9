"""Products of every row count and odd shapes against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.gpu.conftest import INTERPRETED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
SHAPES = (
    [(96, 64), (65, 72), (256, 320)] if INTERPRETED else [(96, 64), (65, 72), (4096, 4096), (1000, 5000), (33, 24)]
)
ROWS = (1, 2, 7, 16, 17, 33) if INTERPRETED else (1, 2, 7, 16, 17, 32, 33, 48, 64, 65, 100, 200, 257)


def exact_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp(min=0)


def near(y: torch.Tensor, exact: torch.Tensor, relative: float = 4e-3) -> None:
    """‖y − exact‖ ≤ relative · ‖exact‖, and no element astray; NaN never passes."""
    assert y.shape == exact.shape
    error = (y.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert float(error) <= relative, float(error)
    scale = exact.abs().amax() + 1e-30
    assert float((y.double() - exact).abs().amax() / scale) <= 4 * relative


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear(kernels, device, rows, N, K, dtype):
    x = torch.randn(rows, K, device=device).to(dtype)
    w = torch.randn(N, K, device=device).to(dtype)
    bias = torch.randn(N, device=device)
    exact = x.double() @ w.double().T
    tolerance = 3e-6 if dtype is torch.float32 else 4e-3
    for _ in range(2):  # the second time on what the first left behind
        near(kernels.pack_linear(w, None)(x), exact, tolerance)
    near(kernels.pack_linear(w, bias)(x), exact + bias.double(), tolerance)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", ROWS)
def test_gated_linear(kernels, device, rows, kind):
    for F, K in [(40, 72), (128, 96)] if INTERPRETED else [(40, 72), (11008, 4096), (3072, 1024)]:
        x = torch.randn(rows, K, device=device).bfloat16()
        w = torch.randn(2 * F, K, device=device).bfloat16() / K**0.5
        bias = torch.randn(2 * F, device=device)
        for b in (None, bias):
            gate, up = (x.double() @ w.double().T + (0 if b is None else b.double())).chunk(2, dim=-1)
            y = kernels.gated_linear(kernels.pack_linear(w, b), x, kind)
            near(y, exact_activation(gate, kind) * up, 8e-3)


@pytest.mark.parametrize(("F", "K"), [(136, 200), (3072, 1024), (6912, 1152), (40, 64), (44, 64)])
def test_gated_linear_of_many_rows(kernels, device, F, K):
    """One kernel with the activation where K is short; tiles at the edges of all three dimensions."""
    for kind in ("silu", "gelu_tanh", "gelu"):
        for rows in (150,) if INTERPRETED else (1024, 1500, 5000):
            x = torch.randn(rows, K, device=device).bfloat16()
            w = (3 * torch.randn(2 * F, K, device=device) / K**0.5).bfloat16()
            linear = kernels.pack_linear(w, None)
            gate, up = (x.double() @ w.double().T).chunk(2, dim=-1)
            exact = exact_activation(gate, kind) * up
            near(kernels.gated_linear(linear, x, kind), exact, 8e-3)
            if INTERPRETED and F == 136:
                near(linear.gated_rows(x, kind), exact, 8e-3)
            if INTERPRETED:
                return
            assert linear.fuses(x) == (F % 8 == 0 and torch.cuda.get_device_capability() == (9, 0))


def test_rows_of_a_wider_tensor(kernels, device):
    wide = torch.randn(5, 300, device=device).bfloat16()
    w = torch.randn(70, 128, device=device).bfloat16()
    linear = kernels.pack_linear(w, None)
    for rows in (1, 5):
        x = wide[:rows, 16:144]
        near(linear(x), x.double() @ w.double().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_written_where_it_is_told(kernels, device, dtype):
    w = torch.randn(300, 128, device=device).to(dtype)
    for bias in (None, torch.randn(300, device=device)):
        for rows in (1, 5, 100):
            x = torch.randn(rows, 128, device=device).to(dtype)
            wide = torch.full((rows + 2, 300), 7.0, dtype=dtype, device=device)
            kernels.pack_linear(w, bias).into(x, wide[:rows])
            exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
            near(wide[:rows], exact, 3e-6 if dtype is torch.float32 else 4e-3)
            assert bool((wide[rows:] == 7).all())


@pytest.mark.parametrize("rows", [1024, 1025, 1537, 5000, 8192])
@pytest.mark.parametrize(("N", "K"), [(96, 64), (1536, 1152), (4096, 1024), (1032, 2056), (1001, 72)])
def test_many_rows(kernels, device, rows, N, K):
    """The library's products, whatever of its kernels is chosen for the shape."""
    if INTERPRETED:
        pytest.skip("a GPU's library")
    x = torch.randn(rows, K, device=device).bfloat16()
    w = (torch.randn(N, K, device=device) / K**0.5).bfloat16()
    exact = x.double() @ w.double().T
    linear = kernels.pack_linear(w, None)
    near(linear(x), exact)
    near(linear(torch.cat((x, x), dim=1)[:, K:]), exact)  # rows of a wider tensor


def test_split_sums_are_the_same_bits_every_time(kernels, device):
    w = torch.randn(256, 2048, device=device).bfloat16()
    linear = kernels.pack_linear(w, None)
    for rows in (1, 4, 32):
        x = torch.randn(rows, 2048, device=device).bfloat16()
        first = linear(x)
        for _ in range(2 if INTERPRETED else 50):
            assert torch.equal(linear(x), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_invariant_rows_are_the_same_bits_in_any_company(device, dtype):
    """What stands in for rows that a tile does not have never reaches those that it has."""
    from foretell.kernels.cuda import CudaKernels

    kernels = CudaKernels(batch_invariant=True)
    for N, K in [(96, 64), (70, 72), (256, 320)] if INTERPRETED else [(96, 64), (65, 72), (4096, 4096), (20000, 512)]:
        x = torch.randn(70, K, device=device).to(dtype)
        w = torch.randn(2 * N, K, device=device).to(dtype) / K**0.5
        linear = kernels.pack_linear(w, None)
        whole, gated = linear(x), kernels.gated_linear(linear, x, "silu")
        near(whole, x.double() @ w.double().T, 3e-6 if dtype is torch.float32 else 4e-3)
        for rows in (1, 2, 17, 64, 65):
            assert torch.equal(linear(x[:rows]), whole[:rows])
            assert INTERPRETED or torch.equal(linear(x[70 - rows :]), whole[70 - rows :])  # elsewhere in the tile
            assert torch.equal(kernels.gated_linear(linear, x[:rows], "silu"), gated[:rows])


def test_invariant_tiles_give_what_they_gave_with_rows_repeated(device, monkeypatch):
    from foretell.kernels import cuda_tuning
    from foretell.kernels.cuda import CudaKernels

    kernels, plain = CudaKernels(batch_invariant=True), cuda_tuning.invariant
    w = torch.randn(256, 320, device=device).bfloat16()
    linear = kernels.pack_linear(w, None)
    for rows in (1, 5, 33):
        x, found = torch.randn(rows, 320, device=device).bfloat16(), []
        for masked in (True, False):
            monkeypatch.setattr(cuda_tuning, "invariant", lambda *a, m=masked: replace(plain(*a), masked=m))
            found.append(linear(x))
        assert torch.equal(*found)
