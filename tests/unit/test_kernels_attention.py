"""Paged attention of every backend against float64, with NaN in every slot that must not be read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foretell.errors import ConfigError
from foretell.kernels import Kernels, get_kernels
from foretell.kernels.base import BatchContext, KVGroupView, KVLayer

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
def cpu() -> Kernels:
    return backend("cpu")


@dataclass
class Case:
    """Sequences of given total lengths, scattered over the blocks of a cache that is NaN elsewhere."""

    lengths: list[int]
    H: int = 6
    G: int = 2
    D: int = 16
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        self.scale = 1.3 * self.D**-0.5
        r = torch.Generator().manual_seed(self.seed)
        needed = [-(-n // self.block_size) for n in self.lengths]
        order = torch.randperm(sum(needed) + 5, generator=r).int()
        self.tables = torch.full((len(self.lengths), max(needed) + 2), -7, dtype=torch.int32)
        shape = (sum(needed) + 5, self.G, self.block_size, self.D)
        self.cache = KVLayer(
            torch.full(shape, torch.nan).to(self.dtype), torch.full(shape, torch.nan).to(self.dtype), 1
        )
        self.q = [torch.randn(n, self.H, self.D, generator=r) for n in self.lengths]
        self.k = [torch.randn(n, self.G, self.D, generator=r) for n in self.lengths]
        self.v = [torch.randn(n, self.G, self.D, generator=r) for n in self.lengths]
        taken = 0
        for s, count in enumerate(needed):
            self.tables[s, :count] = order[taken : taken + count]
            taken += count

    def context(self, queries: list[int], ends: list[int]) -> BatchContext:
        """The last queries[s] tokens before ends[s] of each sequence."""
        slots, positions = [], []
        for s, (n, end) in enumerate(zip(queries, ends, strict=True)):
            p = torch.arange(end - n, end)
            positions.append(p)
            slots.append(self.tables[s][p // self.block_size].long() * self.block_size + p % self.block_size)
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        view = KVGroupView(self.tables.clone(), torch.cat(slots))
        return BatchContext(
            torch.cat(positions), starts, torch.tensor(ends, dtype=torch.int32), (view, view), self.block_size,
            max(queries), max(ends),
        )  # fmt: skip

    def write(self, kernels: Kernels) -> None:
        context = self.context(self.lengths, self.lengths)
        kernels.write_kv(torch.cat(self.k), torch.cat(self.v), self.cache, context)

    def run(self, kernels: Kernels, queries: list[int], ends: list[int] | None = None) -> Tensor:
        ends = ends or self.lengths
        context = self.context(queries, ends)
        if self.window:  # blocks that fell out of the window are stale: point them anywhere
            for s, (n, end) in enumerate(zip(queries, ends, strict=True)):
                dropped = max(0, end - n - self.window + 1) // self.block_size
                context.groups[1].block_tables[s, :dropped] = -9
        q = torch.cat([q[end - n : end] for q, n, end in zip(self.q, queries, ends, strict=True)])
        return kernels.attention(q, self.cache, context, self.scale, self.window)

    def exact(self, queries: list[int]) -> Tensor:
        rows = []
        for q, k, v, n in zip(self.q, self.k, self.v, queries, strict=True):
            k, v = (t.to(self.dtype).double().repeat_interleave(self.H // self.G, 1) for t in (k, v))
            scores = self.scale * torch.einsum("qhd,khd->hqk", q[len(q) - n :].double(), k)
            row, key = torch.arange(len(q) - n, len(q))[:, None], torch.arange(len(q))[None]
            hidden = key > row
            if self.window:
                hidden |= key <= row - self.window
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        return torch.cat(rows)


def check(case: Case, kernels: Kernels, queries: list[int], atol: float = 5e-6) -> None:
    case.write(kernels)
    y = case.run(kernels, queries)
    assert y.shape == (sum(queries), case.H * case.D)
    torch.testing.assert_close(y.double(), case.exact(queries), rtol=2e-5, atol=atol)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, list[int]]:
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    queries = [draw(st.one_of(st.just(1), st.integers(1, n))) for n in lengths]
    G, share = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    return (
        Case(
            lengths, G * share, G, draw(st.sampled_from([1, 7, 16, 17, 33, 48, 64, 80, 96, 128, 200, 256])),
            draw(st.sampled_from([1, 5, 8, 16, 32, 64])), draw(st.sampled_from([None, None, 1, 7, 16, 100])),
            draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)),
        ),
        queries,
    )  # fmt: skip


@given(cases())
@settings(max_examples=40, deadline=None)
def test_matches_float64(kernels, drawn):
    case, queries = drawn
    check(case, kernels, queries)


@pytest.mark.parametrize("window", [None, 70, 1000])
@pytest.mark.parametrize("queries", [[1, 1, 1], [3000, 1, 63], [600, 900, 1000]])
def test_long_sequences(kernels, queries, window):
    check(Case([3000, 1025, 1000], H=4, G=2, D=32, window=window, dtype=torch.bfloat16), kernels, queries)


def test_many_query_heads_share_one_kv_head(kernels):
    check(Case([70, 300], H=71, G=1, D=64), kernels, [1, 90])


def test_strided_q_k_v(kernels):
    case = Case([40, 9], H=6, G=2, D=16)
    M = 49
    qkv = torch.randn(M, 6 + 2 + 2, 16)
    q, k, v = qkv.split([6, 2, 2], dim=1)
    context = case.context([40, 9], [40, 9])
    kernels.write_kv(k, v, case.cache, context)
    case.q, case.k, case.v = (list(t.split([40, 9])) for t in (q, k, v))
    y = kernels.attention(q, case.cache, context, case.scale, None)
    torch.testing.assert_close(y.double(), case.exact([40, 9]), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_rounds_to_the_cache_dtype_and_touches_nothing_else(kernels, dtype):
    case = Case([21, 5], G=3, H=3, D=17, dtype=dtype)
    case.write(kernels)
    written = 0
    for s, (k, v) in enumerate(zip(case.k, case.v, strict=True)):
        for j in range(len(k)):
            block, offset = case.tables[s, j // 16], j % 16
            assert torch.equal(case.cache.k[block, :, offset], k[j].to(dtype))
            assert torch.equal(case.cache.v[block, :, offset], v[j].to(dtype))
            written += k[j].numel()
    assert int((~case.cache.k.isnan()).sum()) == written


@given(cases(), st.lists(st.integers(1, 300), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_token_does_not_depend_on_chunk_or_batch(cpu, drawn, sizes):
    case, _ = drawn
    case.write(cpu)
    whole = case.run(cpu, case.lengths).split(case.lengths)
    for s, n in enumerate(case.lengths):
        alone = Case.__new__(Case)
        alone.__dict__.update(case.__dict__, lengths=[n], tables=case.tables[s : s + 1], q=[case.q[s]])
        done, chunk = 0, 0
        while done < n:
            size = min(sizes[chunk % len(sizes)], n - done)
            y = alone.run(cpu, [size], [done + size])
            assert torch.equal(y, whole[s][done : done + size])
            done, chunk = done + size, chunk + 1


@pytest.mark.parametrize("window", [None, 300])
def test_threads_and_splits_change_nothing(cpu, window):
    case = Case([2900, 700], H=9, G=3, D=64, window=window, dtype=torch.bfloat16)
    case.write(cpu)
    whole = case.run(cpu, case.lengths)
    last = torch.stack([whole[2899], whole[3599]])
    try:
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            assert torch.equal(case.run(cpu, [1, 1]), last), threads
            assert torch.equal(case.run(cpu, case.lengths), whole), threads
    finally:
        cpu.set_threads(torch.get_num_threads())


def test_large_scores_do_not_overflow(kernels):
    case = Case([300], D=32)
    case.q[0] *= 1000
    check(case, kernels, [300], atol=2e-3)  # scores of a thousand carry errors of 1e-4 into the exponent
