"""How close the CPU kernels come to what this machine can do: theory, measurement, torch beside them.

    python bench/kernels.py [--threads N] [--seconds S] [--dtype bfloat16] [--quick]

The floor of a product is the larger of weight bytes ÷ read bandwidth and operations ÷ float32 matrix rate, both
measured here first. Weights rotate through copies larger than the caches, so that one row streams from memory
as in a real decode step. Times are the shortest of many alternating rounds: other work on the machine only adds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from foretell.kernels import get_kernels
from foretell.kernels.base import BatchContext, Kernels, KVGroupView, KVLayer, torch_dtype
from foretell.kernels.cpu_quant import TYPES

SMOLLM2 = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
ROWS = (1, 4, 16, 64, 256, 1024)
QUANTISED, QUANTISED_ROWS = ("Q4_0", "Q4_1", "Q8_0"), (1, 4, 16, 64, 256)
ATTENTION = {  # name: (query lengths, KV lengths), 9 query heads on 3 KV heads of 64
    "decode 1 × 1024": ([1], [1024]),
    "decode 16 × 200": ([1] * 16, [200] * 16),
    "decode 16 × 1024": ([1] * 16, [1024] * 16),
    "prefill 1024": ([1024], [1024]),
    "prefill 256 after 768": ([256], [1024]),
}
CACHE_BYTES = 128 << 20


@dataclass
class Machine:
    read_bytes_per_second: float
    flops_per_second: float


@dataclass
class Row:
    what: str
    rows: int
    floor_us: float
    foretell_us: float
    torch_us: float
    other: str = "torch"  # what is measured beside ours

    def __str__(self) -> str:
        ratio, against = self.foretell_us / self.floor_us, self.torch_us / self.foretell_us
        return (
            f"{self.what:24} M={self.rows:<5} floor {self.floor_us:9.1f} µs   foretell {self.foretell_us:9.1f} µs"
            f"  ({ratio:5.2f} × floor)   {self.other} {self.torch_us:9.1f} µs  ({against:5.2f} × ours)"
        )


def seconds(functions: list[Callable[[], object]], budget: float) -> list[float]:
    """Each function's time in its quietest moment; they run in turns so that they share the noise."""
    best = [float("inf")] * len(functions)
    end, rounds = time.perf_counter() + budget, 0
    while time.perf_counter() < end or rounds < 5:
        rounds += 1
        for i, f in enumerate(functions):
            start = time.perf_counter()
            f()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def measure_machine(budget: float) -> Machine:
    large, square = torch.ones(CACHE_BYTES // 4), torch.ones(1024, 1024)
    read, product = seconds([lambda: large.sum(), lambda: square @ square], budget)
    return Machine(CACHE_BYTES / read, 2 * 1024**3 / product)


def bench_linear(kernels: Kernels, machine: Machine, dtype: torch.dtype, rows: tuple[int, ...], budget: float):
    for name, (N, K) in SMOLLM2.items():
        size = N * K * dtype.itemsize
        weights = [torch.randn(N, K).to(dtype) for _ in range(max(1, CACHE_BYTES // size))]
        packed = [kernels.pack_linear(w, None) for w in weights]
        for M in rows:
            if name == "head" and M > 64:
                continue  # the head is applied to sampled positions only
            x, turn = torch.randn(M, K), 0
            narrow_x = x.to(dtype)

            def ours(x=x, packed=packed):
                nonlocal turn
                turn = (turn + 1) % len(packed)
                return packed[turn](x)

            def theirs(x=narrow_x, weights=weights):
                nonlocal turn
                turn = (turn + 1) % len(weights)
                return F.linear(x, weights[turn])

            a, b = seconds([ours, theirs], budget)
            floor = max(size / machine.read_bytes_per_second, 2 * M * N * K / machine.flops_per_second)
            yield Row(name, M, floor * 1e6, a * 1e6, b * 1e6)


def bench_quantised(kernels: Kernels, machine: Machine, budget: float):
    """GGUF blocks as shipped; beside them our own bfloat16 kernel, whose weights they would be otherwise."""
    for quant_type in QUANTISED:
        _, block, block_bytes = TYPES[quant_type]
        for name, (N, K) in SMOLLM2.items():
            raw = torch.randint(0, 60, (N, K // block * block_bytes), dtype=torch.uint8)  # no scale is infinite
            first, plain = kernels.pack_quantised(raw, quant_type, None), torch.randn(N, K).bfloat16()
            if first is None:
                return
            packed = [first] + [
                kernels.pack_quantised(raw, quant_type, None) for _ in range(CACHE_BYTES // first.nbytes)
            ]
            wide = [kernels.pack_linear(plain, None) for _ in range(max(1, CACHE_BYTES // plain.nbytes))]
            for M in QUANTISED_ROWS[: 4 if name == "head" else None]:
                x, turn = torch.randn(M, K), 0

                def ours(x=x, packed=packed):
                    nonlocal turn
                    turn = (turn + 1) % len(packed)
                    return packed[turn](x)

                def theirs(x=x, wide=wide):
                    nonlocal turn
                    turn = (turn + 1) % len(wide)
                    return wide[turn](x)

                a, b = seconds([ours, theirs], budget)
                floor = max(first.nbytes / machine.read_bytes_per_second, 2 * M * N * K / machine.flops_per_second)
                yield Row(f"{name} {quant_type}", M, floor * 1e6, a * 1e6, b * 1e6, "bfloat16")


def paged(queries: list[int], lengths: list[int], G: int, D: int, dtype: torch.dtype, layers: int, block: int = 16):
    counts = [-(-n // block) for n in lengths]
    order, tables, taken = torch.randperm(sum(counts)).int(), torch.zeros(len(counts), max(counts)).int(), 0
    for s, count in enumerate(counts):
        tables[s, :count] = order[taken : taken + count]
        taken += count
    caches = [KVLayer(*(torch.randn(sum(counts), G, block, D).to(dtype) for _ in "kv"), 0) for _ in range(layers)]
    positions = torch.cat([torch.arange(n - q, n) for q, n in zip(queries, lengths, strict=True)])
    view = KVGroupView(tables, torch.zeros(len(positions), dtype=torch.int64))
    starts, ends = torch.tensor([0, *queries]).cumsum(0).int(), torch.tensor(lengths).int()
    return caches, BatchContext(positions, starts, ends, (view,), block, max(queries), max(lengths))


def bench_attention(kernels: Kernels, machine: Machine, dtype: torch.dtype, budget: float):
    H, G, D = 9, 3, 64
    for name, (queries, lengths) in ATTENTION.items():
        caches, context = paged(queries, lengths, G, D, dtype, layers=30)
        q, turn = torch.randn(sum(queries), H, D), 0
        S, n, kv = len(queries), queries[0], lengths[0]
        # torch reads contiguous float32 K and V of one layer, which stay in cache: an easier task than ours.
        tq, tk, tv = (torch.randn(S, heads, length, D) for heads, length in ((H, n), (G, kv), (G, kv)))
        mask = None if n == kv else torch.ones(n, kv, dtype=torch.bool).tril(kv - n)

        def ours(q=q, caches=caches, context=context):
            nonlocal turn
            turn = (turn + 1) % len(caches)
            return kernels.attention(q, caches[turn], context, 0.125, None)

        def theirs(q=tq, k=tk, v=tv, mask=mask):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

        a, b = seconds([ours, theirs], budget)
        size = sum(lengths) * G * D * 2 * dtype.itemsize
        flops = sum(2 * H * D * q * (2 * n - q + 1) for q, n in zip(queries, lengths, strict=True))
        floor = max(size / machine.read_bytes_per_second, flops / machine.flops_per_second)
        yield Row(name, sum(queries), floor * 1e6, a * 1e6, b * 1e6)


def bench_overhead(kernels: Kernels, budget: float) -> float:
    """Seconds of one smallest call: what Python and the call itself cost."""
    layer, x = kernels.pack_linear(torch.ones(32, 16), None), torch.ones(1, 16)
    return seconds([lambda: layer(x)], budget)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="per measurement")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels, dtype = get_kernels(), torch_dtype(options.dtype)
    machine = measure_machine(max(2.0, options.seconds))
    print(f"{kernels.name} kernels, {options.threads} threads, {platform.machine()}, torch {torch.__version__}")
    print(
        f"reads {machine.read_bytes_per_second / 1e9:.1f} GB/s, multiplies float32 at"
        f" {machine.flops_per_second / 1e9:.0f} GFLOP/s; one call costs {bench_overhead(kernels, 0.2) * 1e6:.1f} µs"
    )
    rows = []
    with torch.inference_mode():
        for row in bench_linear(kernels, machine, dtype, ROWS[::3] if options.quick else ROWS, options.seconds):
            print(row, flush=True)
            rows.append(row)
        for row in bench_quantised(kernels, machine, options.seconds / (4 if options.quick else 1)):
            print(row, flush=True)
            rows.append(row)
        for row in bench_attention(kernels, machine, dtype, options.seconds):
            print(row, flush=True)
            rows.append(row)
    print(json.dumps({"bench": "kernels", "backend": kernels.name, "dtype": options.dtype, "threads": options.threads,
                      "machine": asdict(machine), "rows": [asdict(row) for row in rows]}))  # fmt: skip


if __name__ == "__main__":
    main()
