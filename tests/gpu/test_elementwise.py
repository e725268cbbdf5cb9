"""Norms, activations, the heads on their way to the cache and the best token against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.conftest import INTERPRETED
from tests.gpu.test_linear import exact_activation, near

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
WIDTHS = (1, 17, 256) if INTERPRETED else (1, 17, 576, 1152, 4096, 8192, 10000)


def test_norms_of_many_rows_have_no_idle_lanes(kernels, device, monkeypatch):
    """They take a row in two parts; here few rows do, so that an interpreter can."""
    monkeypatch.setattr("foretell.kernels.cuda.MANY_ROWS", 3)
    for C in (1, 2, 24, 1000, 1152):
        x, y = (torch.randn(5, C, device=device).bfloat16() * 3 + 1 for _ in range(2))
        w, behind = torch.randn(2, C, device=device)
        normed, sums = kernels.add_rms_norm(x, y, w, 1e-5, behind)
        near(sums, x.double() + exact_norm(y, behind), 4e-3)
        near(normed, exact_norm(sums, w), 4e-3)
        near(kernels.rms_norm(x, w, 1e-5), exact_norm(x, w), 4e-3)


def exact_norm(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt() * w.double()


@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms(kernels, device, C, dtype):
    relative = 4e-3 if dtype is torch.bfloat16 else 1e-6
    for rows in (1, 3, 40, 1024) if C < 8000 and not INTERPRETED else (1, 3):
        x, y = (torch.randn(rows, C, device=device).to(dtype) * 3 + 1 for _ in range(2))
        w = torch.randn(C, device=device)
        near(kernels.rms_norm(x, w, 1e-5), exact_norm(x, w), relative)
        normed, sums = kernels.add_rms_norm(x, y, w, 1e-5)
        assert torch.equal(sums, x + y)
        near(normed, exact_norm(x + y, w), relative)
        behind = torch.randn(C, device=device)
        normed, sums = kernels.add_rms_norm(x, y, w, 1e-5, behind)
        near(sums, x.double() + exact_norm(y, behind), relative)
        near(normed, exact_norm(sums, w), relative)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("M", "F"), [(1, 1), (3, 17), (40, 3000)])
def test_gated_activation(kernels, device, kind, M, F):
    # 1 + erf(x) far below zero is a difference of float32 numbers of which nothing is left
    wide = (torch.randn(M, 2 * F + 5, device=device) * 4).clamp(min=-3).bfloat16()
    gate_up = wide[:, 3 : 3 + 2 * F]
    gate, up = gate_up.double().chunk(2, dim=-1)
    near(kernels.gated_activation(gate_up, kind), exact_activation(gate, kind) * up)
