"""Linear layers on GGUF blocks as shipped: against float64, and bit by bit against the dequantised weight."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.errors import ConfigError
from foretell.kernels import get_kernels
from foretell.kernels.cpu import CpuKernels
from foretell.kernels.cpu_quant import TYPES
from foretell.store.gguf_rows import QuantisedRows, stacked


@pytest.fixture(scope="module", autouse=True)
def _poison():
    """In this mode torch.empty returns NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def cpu() -> CpuKernels:
    try:
        kernels = get_kernels("cpu")
    except ConfigError as error:
        pytest.skip(str(error))
    assert isinstance(kernels, CpuKernels)
    return kernels


def blocks(quant_type: str, N: int, K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw rows with every bit at random but finite scales, and the weights they stand for by the gguf package."""
    _, weights, size = TYPES[quant_type]
    rng = numpy.random.default_rng(seed)
    raw = rng.integers(0, 256, (N, K // weights, size), dtype=numpy.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(quant_type, (0,))
    for at in halves:
        scales = rng.uniform(-0.1, 0.1, (N, K // weights)).astype(numpy.float16)
        raw[:, :, at : at + 2] = scales[:, :, None].view(numpy.uint8)
    raw = raw.reshape(N, -1)
    exact = gguf.dequantize(raw, gguf.GGMLQuantizationType[quant_type])
    return torch.from_numpy(raw), torch.from_numpy(exact.copy())


def check(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> None:
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T + 1e-3
    if b is not None:
        exact, size = exact + b.double(), size + b.double().abs()
    assert ((y.double() - exact).abs() / size).max() < 2e-6


@given(
    quant_type=st.sampled_from(sorted(TYPES)), M=st.one_of(st.integers(1, 40), st.just(200)),
    N=st.integers(1, 130), groups=st.integers(1, 30), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_matches_float64_and_the_float32_kernel(cpu, quant_type, M, N, groups, bias, seed):
    weights = TYPES[quant_type][1]
    K = groups * 32 if weights == 32 else (groups + 7) // 8 * weights
    raw, w = blocks(quant_type, N, K, seed)
    x, b = torch.randn(M, K), torch.randn(N) if bias else None
    layer = cpu.pack_quantised(raw, quant_type, b)
    assert layer is not None
    assert (layer.out_features, layer.in_features) == (N, K)
    y = layer(x)
    check(y, x, w, b)
    assert torch.equal(y, cpu.pack_linear(w, b)(x))


@pytest.mark.parametrize("quant_type", sorted(TYPES))
def test_a_row_does_not_depend_on_batch_or_threads(cpu, quant_type):
    raw, _ = blocks(quant_type, 100, 1536)
    layer = cpu.pack_quantised(raw, quant_type, torch.randn(100))
    x = torch.randn(400, 1536)
    whole = layer(x)
    for size in (1, 2, 3, 7, 8, 9, 14, 15, 40, 169):
        pieces = torch.cat([layer(piece) for piece in x.split(size)])
        assert torch.equal(pieces, whole), size
    try:
        for threads in (1, 3):
            cpu.set_threads(threads)
            assert torch.equal(layer(x), whole)
            assert torch.equal(layer(x[:1]), whole[:1])
    finally:
        cpu.set_threads(torch.get_num_threads())


def test_strides_types_and_no_rows(cpu):
    raw, _ = blocks("Q4_1", 40, 64)
    layer = cpu.pack_quantised(raw, "Q4_1", None)
    x = torch.randn(6, 64)
    wide = torch.zeros(6, 200)
    wide[:, 7:71] = x
    assert torch.equal(layer(wide[:, 7:71]), layer(x))
    assert torch.equal(layer(x.T.contiguous().T), layer(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[:0]).shape == (0, 40)


def test_the_layer_owns_its_weight_and_says_its_size(cpu):
    raw, _ = blocks("Q4_1", 64, 576)
    layer = cpu.pack_quantised(raw, "Q4_1", None)
    x = torch.randn(3, 576)
    before = layer(x)
    assert layer.nbytes == raw.nbytes
    raw.zero_()
    assert torch.equal(layer(x), before)


def test_other_types_are_left_to_the_caller(cpu):
    raw = torch.zeros(4, 84, dtype=torch.uint8)
    assert cpu.pack_quantised(raw, "Q2_K", None) is None
    assert get_kernels("reference").pack_quantised(raw, "Q4_0", None) is None


@pytest.mark.parametrize("quant_type", sorted(TYPES))
def test_rows_are_looked_up(quant_type):
    raw, w = blocks(quant_type, 30, 512)
    rows, ids = QuantisedRows(raw, quant_type), torch.tensor([3, 29, 3, 0])
    assert rows.shape == (30, 512)
    assert rows.is_finite()
    assert torch.equal(rows[ids], w[ids])
    at = 208 if quant_type == "Q6_K" else 0
    raw[7, at : at + 2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)  # infinity
    assert not rows.is_finite()


def test_types_with_a_scale_alone_stack():
    parts = [blocks(t, 10, 64) for t in ("Q5_0", "Q8_0", "Q4_0")]
    rows = stacked([QuantisedRows(raw, t) for (raw, _), t in zip(parts, ("Q5_0", "Q8_0", "Q4_0"), strict=True)])
    assert rows is not None
    assert torch.equal(rows[torch.arange(30)], torch.cat([w for _, w in parts]))
    assert stacked([QuantisedRows(parts[0][0], "Q5_0"), QuantisedRows(blocks("Q4_1", 10, 64)[0], "Q4_1")]) is None
