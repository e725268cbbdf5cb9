"""How close the GPU's kernels come to what the card can do: floor, time, share; cuBLAS and torch beside them.

    python bench/gpu/kernels.py [--models llama-3.1-8b,…] [--what linear,decode,prefill,rest] [--search] [--json FILE]

The floor of a kernel is the larger of its bytes ÷ the card's copy rate and its operations ÷ the card's matrix rate,
both measured here first. Kernels run in CUDA graphs over rotating buffers several times the L2 cache; medians of many
replays. ``--search`` times every candidate of the tables in foretell.kernels.cuda_tuning, compiled side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.kernels import cuda_tuning as tuning
from foretell.kernels.base import BatchContext, HeadNorms, KVGroupView, KVLayer
from foretell.kernels.cuda import CudaKernels


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    H: int
    G: int
    D: int
    vocab: int
    window: int | None = None
    norms: bool = False
    kind: str = "silu"

    def linears(self) -> dict[str, tuple[int, int, str]]:
        """name → out_features, in_features, activation behind it"""
        return {
            "qkv": ((self.H + 2 * self.G) * self.D, self.hidden, ""),
            "o": (self.hidden, self.H * self.D, ""),
            "gate_up": (2 * self.ffn, self.hidden, self.kind),
            "down": (self.hidden, self.ffn, ""),
            "head": (self.vocab, self.hidden, ""),
        }


MODELS = {
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "llama-2-7b": Model(4096, 11008, 32, 32, 128, 32000),
    "qwen3-0.6b": Model(1024, 3072, 16, 8, 128, 151936, norms=True),
    "gemma-3-1b": Model(1152, 6912, 4, 1, 256, 262144, 512, True, "gelu_tanh"),
}
ONE_ROW = [
    tuning.OneRow(n, k, w)
    for n, k, w in ((4, 1024, 4), (8, 1024, 4), (8, 512, 4), (16, 512, 4), (4, 2048, 4), (8, 1024, 8), (16, 1024, 8),
                    (2, 2048, 4), (2, 1024, 2), (1, 4096, 4), (32, 128, 4), (64, 128, 4), (1, 2048, 2))
]  # fmt: skip
# block_n, block_k, stages, warps, weights first
PIPELINED = ((64, 256, 3, 4, 1), (64, 128, 4, 4, 1), (64, 128, 6, 4, 1), (64, 512, 2, 8, 1), (128, 128, 4, 8, 1))
GATED = ((64, 128, 3, 4, 1), (64, 128, 4, 4, 1), (64, 64, 6, 4, 1), (32, 128, 5, 4, 0), (128, 64, 4, 8, 1),
         (32, 256, 3, 4, 0))  # fmt: skip
# block_n, block_k, warps of a program that loads its share of K at once
AT_ONCE = ((32, 512, 8), (32, 512, 4), (32, 256, 4), (16, 512, 4), (32, 256, 8), (64, 256, 8), (16, 256, 4))
DECODE = [
    tuning.Decode(n, s, smallest, st, w, 1)
    for (n, st, w), s, smallest in itertools.product(
        ((64, 3, 4), (64, 3, 8), (128, 2, 8), (128, 3, 8), (32, 4, 4)), (1, 2, 8, 32), (128, 256, 1024)
    )
    if s > 1 or smallest == 1024
]
PREFILL = [tuning.Prefill(*p) for p in ((128, 128, 2, 8), (64, 64, 2, 4))]
FRESH = [tuning.Prefill(*p) for p in ((128, 128, 3, 8), (128, 64, 2, 8), (64, 64, 2, 4))]


@dataclass
class Row:
    model: str
    what: str
    rows: int
    floor_us: float
    us: float
    other_us: float
    how: str
    others: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.model:13} {self.what:22} M={self.rows:<5} floor {self.floor_us:8.1f}  ours {self.us:8.1f} µs "
            f"{100 * self.floor_us / self.us:4.0f} %   torch {self.other_us:8.1f} µs  {self.how}"
        )


def graph_us(calls: list[Callable[[], Any]], replays: int = 9) -> float:
    """Median microseconds of one call, all of them captured one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) * 1000 / len(calls))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    x, y = (torch.randn(1 << 30, device="cuda") for _ in range(2))
    copy = 2 * x.nbytes / graph_us([lambda: torch.neg(x, out=y)]) * 1e6  # a copy node would take the copy engine
    read = x.nbytes / graph_us([lambda: x.sum()]) * 1e6
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    matmul = 2 * 8192**3 / graph_us([lambda: a @ b] * 8) * 1e6
    return {"copy_bytes_per_second": copy, "read_bytes_per_second": read, "flops_per_second": matmul}


def buffers(nbytes: int, most: int = 40) -> int:
    """Copies of a weight that together are several times the L2 cache, and enough launches to time."""
    return int(min(max(-(-600_000_000 // nbytes), 6), most))


@contextmanager
def tuned(**chosen: Any) -> Iterator[None]:
    before = {name: getattr(tuning, name) for name in chosen}
    for name, how in chosen.items():
        setattr(tuning, name, lambda *a, _how=how: _how)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(tuning, name, function)


class Bench:
    def __init__(self, limits: dict[str, float], search: bool) -> None:
        self.copy, self.flops, self.search = limits["copy_bytes_per_second"], limits["flops_per_second"], search
        self.kernels = CudaKernels()
        self.rows: list[Row] = []

    def floor_us(self, nbytes: float, flops: float) -> float:
        return max(nbytes / self.copy, flops / self.flops) * 1e6

    def best(self, function: str, candidates: list[Any], calls: Callable[[], list[Callable[[], Any]]]) -> Any:
        """(µs, how, all) of the fastest; without a search, of what the table says."""
        if not self.search:
            return graph_us(calls()), "", {}
        found: dict[str, float] = {"table": graph_us(calls())}
        for how in candidates:
            with tuned(**{function: how}):
                try:
                    found[short(how)] = graph_us(calls())
                except Exception as error:  # too much shared memory, for one
                    found[short(how)] = float("inf")
                    print("skipped", function, how, str(error)[:80])
        winner = min(found, key=lambda name: found[name])
        return found[winner], winner, found

    def linear(self, name: str, model: Model, rows: int) -> None:
        for what, (N, K, kind) in model.linears().items():
            if what == "head" and rows > 256:
                continue
            count = buffers(2 * N * K)
            made = [
                self.kernels.pack_linear((torch.rand(N, K, device="cuda") - 0.5).bfloat16(), None)
                for _ in range(count)
            ]
            x = torch.randn(rows, K, device="cuda").bfloat16()

            def ours(made: Any = made, x: Tensor = x, kind: str = kind) -> list[Callable[[], Any]]:
                if kind:
                    return [lambda w=w: self.kernels.gated_linear(w, x, kind) for w in made]
                return [lambda w=w: w(x) for w in made]

            function, candidates = "one_row", list(ONE_ROW)
            if rows > 1:
                function, candidates = "few_rows", few_rows_candidates(rows, N, K, bool(kind))
            us, how, others = self.best(function, candidates if rows <= 64 else [], ours)
            other = graph_us([lambda w=w, x=x: F.linear(x, w.weight) for w in made])
            floor = self.floor_us(2 * (N * K + rows * (K + N)), 2 * rows * N * K)
            self.add(Row(name, what, rows, floor, us, other, how, others))

    def decode(self, name: str, model: Model, rows: int, length: int) -> None:
        case = Case(model, [length] * rows, [1] * rows)
        count = buffers(case.kv_bytes, 20)
        layers = [case.layer() for _ in range(count)]
        calls = lambda: [lambda kv=kv: case.attend(self.kernels, kv) for kv in layers]  # noqa: E731
        us, how, others = self.best("decode", DECODE, calls)
        floor = self.floor_us(case.kv_bytes, 0)
        self.add(Row(name, f"decode × {length}", rows, floor, us, float("nan"), how, others))

    def prefill(self, name: str, model: Model, lengths: list[int], window: int | None = None) -> None:
        case = Case(model, lengths, lengths, window)
        kv = case.layer()
        flops = sum(2.0 * n * n * model.H * model.D for n in lengths)
        if window:
            flops = sum(4.0 * n * min(n, window) * model.H * model.D for n in lengths)
        q, k, v = case.heads()
        calls = lambda: [lambda: self.kernels.attention(q, kv, case.context, case.scale, window)] * 4  # noqa: E731
        us, how, others = self.best("prefill", PREFILL, calls)
        found = {}
        n = lengths[0]
        qs, ks, vs = (t.unflatten(0, (-1, n)).transpose(1, 2) for t in (q, k, v))
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from foretell.kernels.cuda_dense import dense_attention

        if not window:
            found["dense"] = graph_us([lambda: dense_attention(q, k, v, n, case.scale)] * 4)
        for label, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash2", SDPBackend.FLASH_ATTENTION)):
            try:
                with sdpa_kernel(backend):
                    found[label] = graph_us(
                        [lambda: F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)] * 4
                    )
            except Exception as error:
                print("skipped", label, str(error)[:200])
        out = torch.empty(len(q), model.H * model.D, device="cuda", dtype=q.dtype)
        calls = lambda: [lambda: self.kernels._fresh(q, k, v, case.context, case.scale, window, out)] * 4  # noqa: E731
        found["fresh"], _, fresh_all = self.best("fresh", FRESH, calls)
        others |= {f"fresh {key}": value for key, value in fresh_all.items()}
        others |= found
        tflops = {label: round(flops / t / 1e6) for label, t in {"paged": us, **found}.items()}
        floor = self.floor_us(0, flops)
        what = f"prefill {len(lengths)} × {n}" + (f" w{window}" if window else "")
        self.add(
            Row(name, what, sum(lengths), floor, us, min(found.values(), default=0.0), f"{how} {tflops}", others)
        )

    def rest(self, name: str, model: Model, rows: int) -> None:
        """What stands between the products."""
        C, K = model.hidden, self.kernels
        count = buffers(8 * rows * C)
        w = torch.randn(C, device="cuda")
        xs = [torch.randn(2, rows, C, device="cuda").bfloat16() for _ in range(count)]
        us = graph_us([lambda x=x: K.add_rms_norm(x[0], x[1], w, 1e-5) for x in xs])
        plain = graph_us([lambda x=x: F.rms_norm(x[0] + x[1], (C,), w.bfloat16()) for x in xs])
        self.add(Row(name, "add + norm", rows, self.floor_us(8 * rows * C, 0), us, plain, ""))
        gates = [torch.randn(rows, 2 * model.ffn, device="cuda").bfloat16() for _ in range(count)]
        us = graph_us([lambda g=g: K.gated_activation(g, model.kind) for g in gates])  # type: ignore[arg-type]
        plain = graph_us([lambda g=g: F.silu(g[:, : model.ffn]) * g[:, model.ffn :] for g in gates])
        self.add(Row(name, "gated activation", rows, self.floor_us(6 * rows * model.ffn, 0), us, plain, ""))
        case = Case(model, [rows], [rows])
        kv = case.layer()
        us = graph_us([lambda: K._place(case.qkv, model.H, case.norms, case.rotation, kv, case.context)] * 6)
        width = (model.H + 2 * model.G) * model.D
        moved = 2 * rows * (width + (model.H + 3 * model.G) * model.D)
        self.add(Row(name, "norm, rope, keep", rows, self.floor_us(moved, 0), us, float("nan"), ""))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row, flush=True)


class Case:
    """A batch over a shuffled cache."""

    def __init__(self, model: Model, lengths: list[int], queries: list[int], window: int | None = None) -> None:
        self.model, self.window, self.scale = model, window, model.D**-0.5
        needed = [-(-n // 16) for n in lengths]
        self.blocks = sum(needed)
        order = torch.randperm(self.blocks, device="cuda").int()
        tables = torch.zeros(len(lengths), 1024, dtype=torch.int32, device="cuda")
        slots, positions, at = [], [], 0
        for s, (n, new) in enumerate(zip(lengths, queries, strict=True)):
            tables[s, : needed[s]] = order[at : at + needed[s]]
            at += needed[s]
            p = torch.arange(n - new, n, device="cuda")
            positions.append(p)
            slots.append(tables[s, p // 16].long() * 16 + p % 16)
        M = sum(queries)
        self.qkv = torch.randn(M, (model.H + 2 * model.G) * model.D, device="cuda").bfloat16()
        angle = torch.rand(M, model.D // 2, device="cuda") * 6
        self.rotation = (angle.cos(), angle.sin())
        w = torch.rand(model.D, device="cuda")
        self.norms = HeadNorms(w, w, 1e-6) if model.norms else None
        starts = torch.tensor([0, *queries], device="cuda").cumsum(0).int()
        self.context = BatchContext(
            torch.cat(positions), starts, torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            (KVGroupView(tables, torch.cat(slots)),), 16, max(queries), max(lengths),
        )  # fmt: skip
        self.kv_bytes = 4 * sum(lengths) * model.G * model.D

    def layer(self) -> KVLayer:
        k, v = (
            torch.randn(self.blocks, self.model.G, 16, self.model.D, device="cuda", dtype=torch.bfloat16)
            for _ in "kv"
        )
        return KVLayer(k, v, 0)

    def heads(self) -> tuple[Tensor, ...]:
        m = self.model
        return self.qkv.view(len(self.qkv), -1, m.D).split([m.H, m.G, m.G], dim=1)

    def attend(self, kernels: CudaKernels, kv: KVLayer) -> Tensor:
        q, k, v = self.heads()
        return kernels.attend(q, k, v, self.norms, self.rotation, kv, self.context, self.scale, self.window)


def few_rows_candidates(rows: int, N: int, K: int, gated: bool) -> list[tuning.FewRows]:
    """Tile shapes, each with the splits that give one to four programs per multiprocessor."""
    units = torch.cuda.get_device_properties(0).multi_processor_count
    block_m, found = tuning.power_of_two(rows, 16), []
    N = N // 2 if gated else N
    for n, k, stages, warps, first in GATED if gated else PIPELINED:
        for splits in (1, 2, 4):
            programs = -(-N // n) * splits
            if splits == 1 or (programs <= 2 * units and K // splits >= 2 * k):
                found.append(tuning.FewRows(block_m, n, k, splits, stages, warps, bool(first), 256))
    for n, k, warps in AT_ONCE:
        splits = -(-K // k)
        if -(-N // n) * splits <= 6 * units and block_m <= 64:
            found.append(tuning.FewRows(block_m, n, k, splits, 1, warps, False, 64))
    return found


def short(how: Any) -> str:
    return "×".join(str(int(v)) for v in asdict(how).values()) if is_dataclass(how) else str(how)


def compile_one(task: tuple[str, Any, int, str]) -> str:
    """Run a candidate once in a process of its own, so that it lies compiled in the cache; its error, if any."""
    function, how, rows, kind = task
    kernels = CudaKernels()
    try:
        with tuned(**{function: how}):
            if function in ("one_row", "few_rows"):
                w = torch.randn(2048, 2048, device="cuda").bfloat16()
                x = torch.randn(rows, 2048, device="cuda").bfloat16()
                linear = kernels.pack_linear(w, None)
                y = kernels.gated_linear(linear, x, kind) if kind else linear(x)  # type: ignore[arg-type]
                exact = x.float() @ w.float().T
                if kind:
                    gate, up = exact.chunk(2, dim=-1)
                    exact = (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up
                error = float((y.float() - exact).norm() / exact.norm())
                return "" if error < 5e-3 else f"{task}: error {error}"
            model = MODELS[kind]
            lengths = [500, 700] if function == "decode" else [512, 512]
            case = Case(model, lengths, [1, 1] if function == "decode" else lengths, model.window)
            kv = case.layer()
            if function == "fresh":
                kernels._fresh(
                    *case.heads(), case.context, case.scale, model.window, torch.empty_like(case.heads()[0])
                )
            else:
                case.attend(kernels, kv)
            torch.cuda.synchronize()
    except Exception as error:
        return f"{task}: {str(error)[:150]}"
    return ""


def compile_all(models: dict[str, Model], what: list[str], rows: list[int]) -> None:
    tasks: dict[Any, None] = {}
    for name, model in models.items():
        if "linear" in what:
            for M, (N, K, kind) in itertools.product((r for r in rows if r <= 64), model.linears().values()):
                hows = ONE_ROW if M == 1 else few_rows_candidates(M, N, K, bool(kind))
                tasks |= dict.fromkeys(("one_row" if M == 1 else "few_rows", how, M, kind) for how in hows)
        for function, hows in (("decode", DECODE), ("prefill", PREFILL), ("fresh", FRESH)):
            if function.replace("fresh", "prefill") in what:
                tasks |= dict.fromkeys((function, how, 0, name) for how in hows)
    started = time.time()
    with ProcessPoolExecutor(
        min(14, os.cpu_count() or 1), mp_context=torch.multiprocessing.get_context("spawn")
    ) as pool:
        complaints = [c for c in pool.map(compile_one, tasks, chunksize=2) if c]
    print(f"{len(tasks)} candidates compiled and run in {time.time() - started:.0f} s", *complaints, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--what", default="linear,decode,prefill,rest")
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    models = {name: MODELS[name] for name in args.models.split(",")}
    what, rows = args.what.split(","), [int(r) for r in args.rows.split(",")]
    if args.search:
        compile_all(models, what, rows)
    limits = ceilings()
    print({k: f"{v / 1e12:.2f} T" for k, v in limits.items()}, torch.cuda.get_device_name())
    bench = Bench(limits, args.search)
    if "prefill" in what:
        plan_seconds()
    try:
        for name, model in models.items():
            run_model(bench, name, model, what, rows)
    finally:
        import triton

        report = {
            "date": time.strftime("%Y-%m-%d"), "card": torch.cuda.get_device_name(), "torch": torch.__version__,
            "triton": triton.__version__, "ceilings": limits, "rows": [asdict(row) for row in bench.rows],
        }  # fmt: skip
        if args.json:
            with open(args.json, "w") as file:
                json.dump(report, file, indent=1)
    print(json.dumps({"ceilings": limits, "kernels": len(bench.rows)}))


def plan_seconds() -> None:
    """What cuDNN takes at the first call with a length."""
    from foretell.kernels.cuda_dense import dense_attention

    for n in (1024, 1536, 2048, 8192):
        x = torch.randn(n, 48, 128, device="cuda").bfloat16()
        torch.cuda.synchronize()
        started = time.perf_counter()
        dense_attention(x[:, :32], x[:, 32:40], x[:, 40:], n, 0.1)
        torch.cuda.synchronize()
        print(f"cuDNN's first call at {n}: {1000 * (time.perf_counter() - started):.0f} ms")


def run_model(bench: Bench, name: str, model: Model, what: list[str], rows: list[int]) -> None:
    if "linear" in what:
        for M in rows:
            bench.linear(name, model, M)
            torch.cuda.empty_cache()
    if "decode" in what:
        for S, length in ((1, 256), (32, 256), (256, 512), (32, 8192)):
            bench.decode(name, model, S, length)
            torch.cuda.empty_cache()
    if "prefill" in what:
        bench.prefill(name, model, [4096] * 2)
        if model.window:
            bench.prefill(name, model, [4096] * 2, model.window)
    if "rest" in what:
        for M in (1, 32, 8192):
            bench.rest(name, model, M)


if __name__ == "__main__":
    main()
