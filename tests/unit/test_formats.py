"""Weights in fewer bits: how far codes may be from what they stand for, and how much they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretell.kernels.formats import FORMATS, PerGroup

# ‖error‖ / ‖weight‖ of gaussian weights; a uniform step s leaves s/√12, e4m3 has 3 bits behind the leading one
BOUNDS = {"int8": 0.012, "int4": 0.11, "fp8": 0.03}
BITS = {"int8": 8.2, "int4": 4.4, "fp8": 8.2}


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_near_and_small(name: str) -> None:
    weight = torch.randn(96, 1024, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 96)[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        kept = weight.to(dtype)
        codes = FORMATS[name].quantise(kept)
        wide = FORMATS[name].dequantise(codes, 1024)
        assert wide.shape == kept.shape
        errors = (wide - kept.float()).norm(dim=1) / kept.float().norm(dim=1)
        assert errors.max() < BOUNDS[name]
        assert codes.nbytes * 8 / weight.numel() < BITS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_codes_can_say_is_said_exactly(name: str) -> None:
    """Quantising what was dequantised changes nothing but rounding of the scale."""
    kept_as = FORMATS[name]
    once = kept_as.dequantise(kept_as.quantise(torch.randn(8, 300)), 300)
    zeros = kept_as.dequantise(kept_as.quantise(torch.zeros(3, 300)), 300)
    assert torch.equal(zeros, torch.zeros(3, 300))
    twice = kept_as.dequantise(kept_as.quantise(once), 300)
    assert (twice - once).abs().max() <= (0.12 if name == "int4" else 1e-5) * once.abs().max()


@given(st.integers(1, 5), st.integers(1, 600), st.floats(-3, 3), st.integers(0, 2**30))
def test_no_weight_of_a_group_is_more_than_a_step_away(rows: int, columns: int, shift: float, seed: int) -> None:
    """With a range that reaches both ends, each weight is within half a step of its code, plus the scale's
    rounding."""
    plain = PerGroup(factors=(8 / 7,))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift
    wide = plain.dequantise(plain.quantise(weight), columns)
    for at in range(0, columns, plain.group):
        part = weight[:, at : at + plain.group]
        step = part.abs().amax(1) / 7
        assert ((wide[:, at : at + plain.group] - part).abs().amax(1) <= step * 0.54).all()
