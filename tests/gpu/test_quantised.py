"""Layers in codes: every row count and odd shapes against float64 products with what the codes mean."""

from __future__ import annotations

import pytest
import torch

from foretell.kernels.formats import FORMATS
from tests.gpu.conftest import INTERPRETED
from tests.gpu.test_linear import exact_activation, near

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
SHAPES = (
    [(96, 64), (65, 72), (64, 576)] if INTERPRETED else [(96, 64), (65, 72), (960, 576), (4096, 4096), (512, 14336)]
)
ROWS = (1, 17, 70) if INTERPRETED else (1, 2, 16, 17, 33, 64, 65, 200, 256, 257, 1000)


def layer(kernels, device, name, N, K, dtype=torch.bfloat16, bias=True):
    weight = torch.randn(N, K, device=device).to(dtype) / K**0.5
    linear = kernels.quantise_linear(weight, torch.randn(N, device=device) if bias else None, name)
    exact = FORMATS[name].dequantise(linear.codes, K).double()
    return linear, exact


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_products(kernels, device, name, N, K):
    for dtype in (torch.bfloat16, torch.float16):
        linear, weight = layer(kernels, device, name, N, K, dtype)
        for rows in ROWS:
            x = torch.randn(rows, K, device=device).to(dtype)
            rounds = linear.rounds and rows > 64 and dtype is torch.bfloat16
            for _ in range(2):  # the second time on what the first left behind
                # rounded activations have 3 bits behind the leading one
                near(linear(x), x.double() @ weight.T + linear.bias.double(), 0.08 if rounds else 6e-3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(kernels, device, name, kind):
    for F, K in [(40, 72), (32, 160)] if INTERPRETED else [(40, 72), (1536, 576), (14336, 4096)]:
        linear, weight = layer(kernels, device, name, 2 * F, K, bias=F == 40)
        for rows in ROWS[: 2 if INTERPRETED else 6]:
            x = torch.randn(rows, K, device=device).bfloat16()
            product = x.double() @ weight.T + (0 if linear.bias is None else linear.bias.double())
            gate, up = product.chunk(2, dim=-1)
            near(kernels.gated_linear(linear, x, kind), exact_activation(gate, kind) * up, 1e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_expanded_weights_are_what_the_codes_mean(kernels, device, name):
    for N, K in ((65, 72), (33, 576)):
        linear, weight = layer(kernels, device, name, N, K)
        assert torch.equal(linear.expanded(), weight.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_an_invariant_row_does_not_know_its_batch(device, name):
    from foretell.kernels.cuda import CudaKernels

    linear, weight = layer(CudaKernels(batch_invariant=True), device, name, 96, 320)
    x = torch.randn(300 if not INTERPRETED else 70, 320, device=device).bfloat16()
    whole = linear(x)
    near(whole, x.double() @ weight.T + linear.bias.double(), 6e-3)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(1, 68)):
        if not INTERPRETED:  # numpy's products are not
            assert torch.equal(linear(x[rows]), whole[rows])


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_every_time(kernels, device, name):
    linear, _ = layer(kernels, device, name, 256, 2048)
    for rows in (1, 32):
        x = torch.randn(rows, 2048, device=device).bfloat16()
        first = linear(x)
        for _ in range(2 if INTERPRETED else 50):
            assert torch.equal(linear(x), first)
