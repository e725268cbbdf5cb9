"""Decode and prefill attention with all that goes before it, against float64; NaN in every slot nothing may read."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from foretell.kernels.base import BatchContext, HeadNorms, KVGroupView, KVLayer
from tests.gpu.conftest import INTERPRETED
from tests.gpu.test_linear import near

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]
EPS = 1e-6
LONG = 40 if INTERPRETED else 5000


@dataclass
class Case:
    """Sequences of these lengths, of which the last ``queries`` tokens are new."""

    lengths: list[int]
    queries: list[int]
    H: int = 4
    G: int = 2
    D: int = 64
    R: int = 32
    window: int | None = None
    norms: bool = False
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None  # of the cache where it is another
    block_size: int = 16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def __post_init__(self) -> None:
        r = torch.Generator().manual_seed(self.seed)
        d, self.scale = self.device, 1.3 * self.D**-0.5
        needed = [-(-n // self.block_size) for n in self.lengths]
        order = torch.randperm(sum(needed) + 3, generator=r).int()
        self.tables = torch.full((len(needed), max(1, *needed) + 2), -7, dtype=torch.int32)
        taken = 0
        for s, count in enumerate(needed):
            self.tables[s, :count] = order[taken : taken + count]
            taken += count
        shape = (sum(needed) + 3, self.G, self.block_size, self.D)
        self.k_cache, self.v_cache = (torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(2))
        self.k_old = [self.kept(torch.randn(n, self.G, self.D, generator=r)) for n in self.lengths]
        self.v_old = [self.kept(torch.randn(n, self.G, self.D, generator=r)) for n in self.lengths]
        positions, slots = [], []
        for s, (n, new) in enumerate(zip(self.lengths, self.queries, strict=True)):
            for cache, values in ((self.k_cache, self.k_old[s]), (self.v_cache, self.v_old[s])):
                p = torch.arange(n - new)
                cache[self.tables[s, p // self.block_size].long(), :, p % self.block_size] = values[: n - new]
            p = torch.arange(n - new, n)
            positions.append(p)
            slots.append(self.tables[s, p // self.block_size].long() * self.block_size + p % self.block_size)
            if self.window:  # blocks that fell out of the window are stale
                self.tables[s, : max(0, n - new - self.window + 1) // self.block_size] = -9
        self.positions, self.slots = torch.cat(positions), torch.cat(slots)
        M = len(self.positions)
        self.qkv = torch.randn(M, (self.H + 2 * self.G) * self.D, generator=r).to(self.dtype)
        angles = torch.outer(self.positions.double(), 10000.0 ** -(torch.arange(self.R).double() / max(self.R, 1)))
        self.rotation = (angles.cos().float().to(d), angles.sin().float().to(d)) if self.R else None
        w = torch.randn(2, self.D, generator=r)
        self.head_norms = HeadNorms(w[0].to(d), w[1].to(d), EPS) if self.norms else None
        k_cache, v_cache = (cache.to(self.cache_dtype or self.dtype) for cache in (self.k_cache, self.v_cache))
        self.kv = KVLayer(k_cache.to(d), v_cache.to(d), 0)
        starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        view = KVGroupView(self.tables.to(d), self.slots.to(d))
        self.context = BatchContext(
            self.positions.to(d), starts.to(d), torch.tensor(self.lengths, dtype=torch.int32).to(d), (view,),
            self.block_size, max(self.queries), max(self.lengths),
        )  # fmt: skip

    def kept(self, x: Tensor) -> Tensor:
        """As the cache keeps it."""
        return x.to(self.dtype).to(self.cache_dtype or self.dtype).to(self.dtype)

    def run(self, kernels) -> Tensor:
        heads = self.qkv.to(self.device, copy=True).view(len(self.qkv), -1, self.D)
        q, k, v = heads.split([self.H, self.G, self.G], dim=1)
        return kernels.attend(q, k, v, self.head_norms, self.rotation, self.kv, self.context, self.scale, self.window)

    def placed(self, heads: Tensor, weight: Tensor | None) -> Tensor:
        """Heads [M, n, D] normed and rotated, rounded to the dtype after each."""
        x = heads.double()
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.cpu().double()
            x = x.to(self.dtype).double()
        if self.rotation is not None:
            c, s = (t.cpu().double()[:, None] for t in self.rotation)
            low, high = x[..., : self.R], x[..., self.R : 2 * self.R]
            x = torch.cat((low * c - high * s, high * c + low * s, x[..., 2 * self.R :]), dim=-1)
        return x.to(self.dtype)

    def exact(self) -> Tensor:
        q, k, v = self.qkv.view(len(self.qkv), -1, self.D).split([self.H, self.G, self.G], dim=1)
        w = self.head_norms
        q, k = self.placed(q, w and w.q), self.placed(k, w and w.k)
        rows, at = [], 0
        for s, (n, new) in enumerate(zip(self.lengths, self.queries, strict=True)):
            if n == 0:
                rows.append(torch.zeros(new, self.H * self.D, dtype=torch.float64))
                at += new
                continue
            self.k_old[s][n - new :], self.v_old[s][n - new :] = (
                self.kept(k[at : at + new]),
                self.kept(v[at : at + new]),
            )
            keys, values = (t.double().repeat_interleave(self.H // self.G, 1) for t in (self.k_old[s], self.v_old[s]))
            scores = self.scale * torch.einsum("qhd,khd->hqk", q[at : at + new].double(), keys)
            row, key = torch.arange(n - new, n)[:, None], torch.arange(n)[None]
            hidden = key > row
            if self.window:
                hidden |= key <= row - self.window
            rows.append(
                torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values).flatten(1)
            )
            at += new
        return torch.cat(rows)

    def check(self, kernels) -> None:
        rows = slice(None) if self.context.last_rows is None else self.context.last_rows.cpu()
        near(self.run(kernels).cpu(), self.exact()[rows], 1e-5 if self.dtype is torch.float32 else 1e-2)
        k_cache, v_cache = self.kv.k.cpu().to(self.dtype), self.kv.v.cpu().to(self.dtype)
        for s, (n, new) in enumerate(zip(self.lengths, self.queries, strict=True)):
            p = torch.arange(max(n - new, 0), n)
            at = (self.tables[s, p // self.block_size].long(), slice(None), p % self.block_size)
            # a key between two codes may fall to either side of them
            near(
                k_cache[at], self.k_old[s][n - new :].double(), 4e-3 if self.cache_dtype is None else 0.05
            ) if n else None
            assert torch.equal(v_cache[at], self.v_old[s][n - new :] if n else v_cache[at])
        assert int((~v_cache.isnan()).sum()) == sum(self.lengths) * self.G * self.D, "written beside its slots"


HEADS = [(4, 4), (4, 1), (6, 2), (8, 1), (15, 3), (32, 8), (7, 7)]


@pytest.mark.parametrize(("H", "G"), HEADS)
def test_decode(kernels, device, H, G):
    lengths = [1, 2, 17, LONG, 333 if not INTERPRETED else 33]
    for window in (None, 20)[: 2 if H < 8 else 1]:
        Case(lengths, [1] * 5, H, G, window=window, device=device, norms=H == 6).check(kernels)


def test_decode_of_many_sequences(kernels, device):
    """Batches of every class of sizes, which have tiles of their own, or with MHA a kernel of their own."""
    for count, H in ((3, 8), (5, 8), (9, 16)) if INTERPRETED else ((30, 8), (90, 8), (150, 8), (200, 16), (20, 16)):
        for window in (None, 700):
            lengths = [max(1, (50 + 29 * i) // (20 if INTERPRETED else 1)) for i in range(count - 1)] + [LONG]
            Case(lengths, [1] * count, H, 8, 128, 64, window, norms=H == 8, device=device).check(kernels)


@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
def test_decode_where_each_head_has_keys_of_its_own(kernels, device, D):
    """Pairs of a sequence and a head enough for the kernel that has no matrix unit; one sequence only pads."""
    count = 5 if INTERPRETED else 80
    case = Case(
        [1 + (7 if INTERPRETED else 61) * i for i in range(count)], [1] * count, 8, 8, D, D // 4, device=device
    )
    case.context.kv_lens[-1] = 0
    y = case.run(kernels).cpu()
    near(y[:-1], case.exact()[:-1], 1e-2)
    assert not y[-1].any()
    kept = int((~case.kv.v.isnan()).sum())
    assert kept == (sum(case.lengths) - 1) * 8 * D, "padding is kept, or somebody's token is not"


DIMS = [(D, torch.bfloat16) for D in (32, 64, 80, 96, 128, 256)] + [(D, torch.float32) for D in (64, 256)]


@pytest.mark.parametrize(("D", "dtype"), DIMS)
def test_decode_head_dims(kernels, device, D, dtype):
    norms = dtype is torch.bfloat16
    Case([LONG, 1, 50], [1, 1, 1], 4, 2, D, D // 2, dtype=dtype, norms=norms, device=device).check(kernels)


@pytest.mark.parametrize(("D", "window"), [(64, None), (96, 20), (128, None), (256, 20)])
def test_a_cache_of_8_bits(kernels, device, D, window):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    lengths = [1, 50, LONG, 17]
    for queries in ([1, 1, 1, 1], [1, 33, 20, 17], [1, 1, 33, 5]):
        R, norms = (0, False) if INTERPRETED else (D // 2, D == 64)
        case = Case(lengths, queries, 8, 2, D, R, window, cache_dtype=torch.float8_e4m3fn, norms=norms, device=device)
        if INTERPRETED:  # Triton's interpreter loses the carry of 1.95 → 2 in 8 bits: nothing to round for it
            case.qkv = case.kept(case.qkv)
        case.context.chunks = [(n - m, m) for n, m in zip(lengths, queries, strict=True)]
        case.check(kernels)


@pytest.mark.parametrize(("H", "G"), HEADS[1::2])
def test_prefill(kernels, device, H, G):
    window = 20 if H == 8 else None
    lengths = [1, 30, 47, 16] if INTERPRETED else [1, 300, 1000, 64]
    for new in (lengths, [-(-n // 2) for n in lengths], [1, 1, lengths[2], 16]):
        case = Case(lengths, new, H, G, window=window, device=device)
        case.check(kernels)
        case = Case(lengths, new, H, G, window=window, device=device)
        case.context.chunks = [(n - m, m) for n, m in zip(lengths, new, strict=True)]
        case.check(kernels)


@pytest.mark.parametrize("window", [None, 20])
def test_mixed_batches(kernels, device, window):
    """Sequences of one new token before others: those take the decode kernel."""
    lengths = [40, 1, 33, 50, 7, 90]
    for new in ([1, 1, 1, 50, 7, 1], [1, 1, 33, 20, 1, 5], [1, 1, 1, 1, 1, 89]):
        case = Case(lengths, new, 8, 2, 64, window=window, norms=True, device=device)
        case.context.chunks = [(n - m, m) for n, m in zip(lengths, new, strict=True)]
        case.check(kernels)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("D", "dtype"), [(64, torch.bfloat16), (256, torch.bfloat16), (80, torch.float32)])
def test_a_last_layer_gives_last_rows_and_keeps_all(kernels, device, window, D, dtype):
    lengths = [40, 1, 33, 50, 7, 90]
    for new in ([1, 1, 1, 1, 1, 89], [40, 1, 33, 50, 7, 90], [1, 1, 13, 20, 2, 5]):
        case = Case(lengths, new, 8, 2, D, D // 2, window, True, dtype, device=device)
        case.context.last_rows = case.context.query_starts[1:] - 1
        case.check(kernels)


@pytest.mark.parametrize("window", [None, 300])
def test_long_prompts_with_nothing_before_them(kernels, device, window):
    """Those go to the library's kernel, or without it to one that reads no cache; the others to ours."""
    scale = 50 if INTERPRETED else 1
    for lengths, new in (
        ([1500, 1500], [1500, 1500]), ([1024, 3000, 700], [1024, 3000, 700]), ([2000, 1100, 40], [2000, 500, 1]),
        ([40, 2000, 1100, 1500], [1, 2000, 500, 1500]),
    ):  # fmt: skip
        lengths = [-(-n // scale) for n in lengths]
        new = [min(-(-m // scale), n) for m, n in zip(new, lengths, strict=True)]
        case = Case(lengths, new, 8, 2, 128, window=window, device=device)
        case.context.chunks = [(n - m, m) for n, m in zip(lengths, new, strict=True)]
        case.check(kernels)


@pytest.mark.parametrize(("D", "dtype"), DIMS)
def test_prefill_head_dims(kernels, device, D, dtype):
    n, norms = 40 if INTERPRETED else 700, dtype is torch.float32
    Case([n, 20], [n, 3], 4, 2, D, D // 2, dtype=dtype, norms=norms, device=device).check(kernels)


@pytest.mark.parametrize("R", [0, 8])
@pytest.mark.parametrize("queries", [[1, 1], [20, 9]])
def test_no_rotation_and_part_of_a_head(kernels, device, R, queries):
    Case([40, 9], queries, 4, 2, 64, R, norms=True, device=device).check(kernels)


def test_padding_rows_are_zero_and_keep_nothing(kernels, device):
    case = Case([30, 17, 0, 0], [1, 1, 0, 0], device=device)
    case.qkv = torch.cat((case.qkv, torch.full((2, case.qkv.shape[1]), torch.nan, dtype=case.dtype)))
    pad = torch.zeros(2, case.R, device=device)
    case.rotation = tuple(torch.cat((t, pad)) for t in case.rotation)
    y = case.run(kernels)
    assert y.shape[0] == 4
    assert not y[2:].any()
    case.queries = [1, 1, 1, 1]
    near(y[:2].cpu(), case.exact()[:2], 1e-2)


@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_block_sizes(kernels, device, block_size):
    for queries in ([1, 1], [33, 2]):
        Case([70, 33], queries, block_size=block_size, device=device).check(kernels)


@pytest.mark.parametrize("seed", range(2 if INTERPRETED else 8))
def test_random_batches(kernels, device, seed):
    r = torch.Generator().manual_seed(seed)
    pick = lambda *xs: xs[int(torch.randint(len(xs), (1,), generator=r))]  # noqa: E731
    longest = 60 if INTERPRETED else pick(64, 600, 3000, 32768)
    count = int(torch.randint(1, 5, (1,), generator=r))
    lengths = [int(torch.randint(1, longest + 1, (1,), generator=r)) for _ in range(count)]
    queries = [min(n, pick(1, 2, 40, 500), n) for n in lengths] if pick(0, 1) else [1] * count
    G, share, D = pick(1, 2, 3, 5), pick(1, 2, 3, 4, 7, 8), pick(32, 64, 80, 96, 128, 256)
    R = pick(D // 2, D // 4, D // 2)
    window = pick(None, None, 1, 7, 100, 1000)
    Case(lengths, queries, G * share, G, D, R, window, bool(pick(0, 1)), device=device, seed=seed).check(kernels)


@pytest.mark.parametrize("window", [None, 100])
def test_an_invariant_row_does_not_know_its_batch_or_chunk(device, window):
    from foretell.kernels.cuda import CudaKernels

    kernels = CudaKernels(batch_invariant=True)
    n = 40 if INTERPRETED else 700
    whole = Case([n, 20], [n, 20], 8, 2, 64, window=window, device=device, norms=True)
    exact, y = whole.exact(), whole.run(kernels)
    near(y.cpu(), exact, 1e-2)
    for parts in ([1, n - 1], [n // 2, n - n // 2], [n - 7, 3, 2, 1, 1]):
        alone = Case([n, 20], [n, 20], 8, 2, 64, window=window, device=device, norms=True)
        first = 0
        for size in parts:
            step = Case([first + size], [size], 8, 2, 64, window=window, device=device, norms=True)
            part = slice(first, first + size)
            step.qkv, step.kv, step.head_norms = alone.qkv[part], alone.kv, alone.head_norms
            step.rotation = tuple(t[part] for t in alone.rotation)
            tables = alone.context.groups[0].block_tables[:1]
            step.context.groups = (KVGroupView(tables, alone.slots[part].to(device)),)
            assert torch.equal(step.run(kernels), y[part])
            first += size


def test_an_invariant_product_does_not_know_the_rows_beside_it(device):
    from foretell.kernels.cuda import CudaKernels

    kernels = CudaKernels(batch_invariant=True)
    N, K = (96, 160) if INTERPRETED else (2048, 1024)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(100 if INTERPRETED else 300, K, device=device).to(dtype)
        linear = kernels.pack_linear((torch.randn(N, K, device=device) / K**0.5).to(dtype), None)
        plain, gated = linear(x), kernels.gated_linear(linear, x, "silu")
        near(plain, x.double() @ linear.weight.double().T, 4e-3)
        for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(64, 100), slice(1, 90)):
            if INTERPRETED:  # numpy's products are not
                continue
            assert torch.equal(linear(x[rows]), plain[rows])
            assert torch.equal(kernels.gated_linear(linear, x[rows], "silu"), gated[rows])
