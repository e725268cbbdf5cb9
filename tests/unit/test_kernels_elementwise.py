"""Norms, activations and rotary embedding of every backend against float64 formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import ConfigError
from foretell.kernels import Kernels, get_kernels

KINDS = ("silu", "gelu", "gelu_tanh", "relu")


@pytest.fixture(scope="module", autouse=True)
def _poison():
    """In this mode torch.empty returns NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    try:
        return get_kernels(request.param)
    except ConfigError as error:
        pytest.skip(str(error))


def exact_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    x = x.double()
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp(min=0)


def close(y: torch.Tensor, exact: torch.Tensor, rtol: float = 1e-6, atol: float = 2e-6) -> None:
    torch.testing.assert_close(y.double(), exact, rtol=rtol, atol=atol)


@given(rows=st.integers(1, 20), C=st.integers(1, 700), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_norms(kernels, rows, C, seed):
    r = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, C, generator=r) * 3 + 1
    w, b = torch.randn(C, generator=r), torch.randn(C, generator=r)
    d, eps = x.double(), 1e-5
    close(kernels.rms_norm(x, w, eps), d / (d.square().mean(-1, keepdim=True) + eps).sqrt() * w.double(), 3e-6)
    centred = d - d.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()
    # Near-constant rows (C of 1 or 2) lose digits in x - mean whatever the formula.
    close(kernels.layer_norm(x, w, b, eps), normed + b.double(), 1e-5, 2e-4 if C < 3 else 1e-5)
    close(kernels.layer_norm(x, w, None, eps), normed, 1e-5, 2e-4 if C < 3 else 1e-5)


def test_norm_of_heads_in_a_qkv_view(kernels):
    heads = torch.randn(5, 10, 24)[:, 2:7]
    w = torch.randn(24)
    d = heads.double()
    y = kernels.rms_norm(heads, w, 1e-6)
    assert y.shape == heads.shape
    close(y, d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w.double(), 3e-6)
    close(kernels.rms_norm(heads[0], w.bfloat16().float(), 1e-6), close_norm(d[0], w.bfloat16().double()), 3e-6)


def close_norm(d: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w


@pytest.mark.parametrize("kind", KINDS)
def test_activations(kernels, kind):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4])])
    close(kernels.activate(x, kind), exact_activation(x, kind))
    assert kernels.activate(torch.full((3, 5), torch.nan), kind).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "F"), [(1, 1), (3, 17), (40, 1536)])
def test_gated_activation(kernels, kind, M, F):
    wide = torch.randn(M, 2 * F + 5) * 4
    gate_up = wide[:, 3 : 3 + 2 * F]
    gate, up = gate_up.double().chunk(2, dim=-1)
    y = kernels.gated_activation(gate_up, kind)
    assert y.shape == (M, F)
    close(y, exact_activation(gate, kind) * up, 2e-6, 5e-6)


@given(M=st.integers(1, 9), heads=st.integers(1, 5), R=st.integers(1, 70), rest=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_rope_rotates_in_place_and_leaves_the_rest(kernels, M, heads, R, rest):
    r = torch.Generator().manual_seed(R)
    buffer = torch.randn(M, heads + 3, 2 * R + rest, generator=r)
    before, x = buffer.clone(), buffer[:, 1 : 1 + heads]
    angle = torch.rand(M, R, generator=r) * 6
    cos, sin = angle.cos(), angle.sin()
    kernels.rope_(x, cos, sin)
    a, b = before[:, 1 : 1 + heads, :R].double(), before[:, 1 : 1 + heads, R : 2 * R].double()
    c, s = cos.double()[:, None], sin.double()[:, None]
    close(x[..., :R], a * c - b * s)
    close(x[..., R : 2 * R], b * c + a * s)
    assert torch.equal(x[..., 2 * R :], before[:, 1 : 1 + heads, 2 * R :])
    assert torch.equal(buffer[:, 0], before[:, 0])
    assert torch.equal(buffer[:, 1 + heads :], before[:, 1 + heads :])


def test_half_precision_inputs_keep_their_dtype(kernels):
    x, w = torch.randn(4, 32).bfloat16(), torch.randn(32)
    assert kernels.rms_norm(x, w, 1e-5).dtype == torch.bfloat16
    assert kernels.layer_norm(x, w, None, 1e-5).dtype == torch.bfloat16
    assert kernels.gated_activation(x, "silu").dtype == torch.bfloat16
