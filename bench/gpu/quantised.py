"""Linear layers in fewer bits: how close their kernels come to reading the codes, beside bfloat16.

    python bench/gpu/quantised.py [--model llama-3.1-8b] [--rows 1,32] [--search] [--json FILE]
    python bench/gpu/quantised.py --end-to-end SHAPES [--model llama-3.1-8b] [--json FILE]

The floor is the bytes of codes, scales, inputs and outputs over the copy rate, measured here first. Kernels run
in CUDA graphs over rotating weights several times the L2 cache. ``--search`` times other tiles than those of
foretell.kernels.cuda_quantised, compiled side by side. ``--end-to-end`` runs decode and prefill of bench/gpu/run.py
through ``LLM.generate`` in every format, in the batch-invariant mode and in bfloat16 beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels import MODELS, graph_us

from foretell.kernels import cuda_quantised
from foretell.kernels.cuda import CudaKernels
from foretell.kernels.cuda_quantised import CudaQuantisedLinear, Tiles
from foretell.kernels.formats import FORMATS
from foretell.kernels.triton_common import launch, num_multiprocessors, shared_bytes

DEVICE = torch.device("cuda")
ROTATED_BYTES = 300 << 20
ONE = [
    Tiles(1, n, k, 1, 1, w)
    for n, k, w in ((4, 2048, 4), (8, 1024, 4), (2, 4096, 4), (8, 2048, 8), (1, 4096, 4), (2, 2048, 4))
]
# block_n, block_k, stages, warps
BYTES = ((64, 128, 4, 4), (64, 256, 3, 4), (32, 256, 4, 4), (128, 128, 3, 4), (64, 256, 3, 8), (32, 128, 6, 2))
NIBBLES = ((64, 128, 4, 4), (64, 128, 6, 4), (128, 128, 3, 4), (128, 128, 3, 8), (32, 128, 5, 4), (32, 128, 6, 2))


@dataclass(frozen=True)
class Row:
    layer: str
    format: str
    rows: int
    floor_us: float
    us: float
    how: str

    def __str__(self) -> str:
        return (
            f"{self.layer:8} {self.format:5} M={self.rows:<4} floor {self.floor_us:7.1f}  {self.us:7.1f} µs "
            f"{100 * self.floor_us / self.us:4.0f} %  {self.how}"
        )


class Case:
    """One layer's shape in one format: copies to take in turn, so that none is in the cache when its turn comes."""

    def __init__(self, kernels: CudaKernels, name: str, weight: torch.Tensor, kind: str, kept_as: str) -> None:
        self.kernels, self.name, self.kind, self.format = kernels, name, kind, kept_as
        linear: Any = (
            kernels.pack_linear(weight, None) if kept_as == "bf16" else kernels.quantise_linear(weight, None, kept_as)
        )
        self.layers = [linear, *(own(linear) for _ in range(ROTATED_BYTES // linear.nbytes))]
        self.out, self.K = linear.out_features // (2 if kind else 1), linear.in_features

    def inputs(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.K, device=DEVICE).bfloat16()

    def us(self, x: torch.Tensor, how: Tiles | None = None) -> float:
        calls: list[Callable[[], Any]]
        if how is not None:
            calls = [partial(layer.launch, x, self.kind, how) for layer in self.layers]
        elif self.kind:
            calls = [partial(self.kernels.gated_linear, layer, x, self.kind) for layer in self.layers]
        else:
            calls = [partial(layer, x) for layer in self.layers]
        return graph_us(calls * max(2, 20 // len(calls)), 5)

    def floor_us(self, rows: int, rate: float) -> float:
        return (self.layers[0].nbytes + 2 * rows * (self.K + self.out)) / rate * 1e6

    def candidates(self, rows: int) -> list[Tiles]:
        group, units = FORMATS[self.format].group, num_multiprocessors(DEVICE)
        plain = cuda_quantised.tiles(rows, self.out, self.K, bool(self.kind), group, units)
        found: list[Tiles] = list(ONE) if rows == 1 and not group else []
        for block_n, block_k, stages, warps in NIBBLES if group else BYTES:
            for splits in sorted({max(1, plain.splits // 2), plain.splits}):
                tiles = Tiles(plain.block_m, block_n, block_k, splits, stages, warps)
                fitted = tiles.fitted(bool(self.kind), group, shared_bytes(DEVICE))
                if fitted not in found:
                    found.append(fitted)
        return found


def own(linear: Any) -> Any:
    """The layer with memory of its own."""
    other = copy.copy(linear)
    if isinstance(linear, CudaQuantisedLinear):
        other.codes = replace(linear.codes, codes=linear.codes.codes.clone(), scales=linear.codes.scales.clone())
    else:
        other.weight = linear.weight.clone()
    return other


def search(case: Case, rows: int) -> tuple[float, str]:
    x, found = case.inputs(rows), []
    for tiles in case.candidates(rows):
        try:
            found.append((case.us(x, tiles), str(tiles).removeprefix("Tiles")))
        except Exception as error:  # more shared memory than there is, say
            print("  no:", tiles, str(error).splitlines()[0][:90], flush=True)
    found.sort()
    for us, tiles_text in found[1:3]:
        print(f"     {us:7.1f} µs {tiles_text}")
    return found[0]


def compile_all(cases: list[Case], rows: list[int]) -> None:
    """All candidates at once, in threads that only compile; each distinct kernel once."""
    jobs: dict[tuple[object, ...], Callable[[], Any]] = {}
    for case in cases:
        for count in rows:
            for how in case.candidates(count):
                key = (case.format, case.kind, replace(how, splits=min(how.splits, 2)))
                x = torch.empty(count, case.K, dtype=torch.bfloat16, device=DEVICE)
                jobs[key] = partial(case.layers[0].launch, x, case.kind, how)

    def only_compile() -> None:
        launch.compiling = True

    with ThreadPoolExecutor(16, initializer=only_compile) as pool:
        for job in [pool.submit(job) for job in jobs.values()]:
            job.exception()
    print(f"{len(jobs)} kernels compiled", flush=True)


MODES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    **{name: {"quantization": name} for name in FORMATS},
    "fp8, fp8 cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"}, "batch-invariant": {"batch_invariant": True},
}  # fmt: skip


def end_to_end(shapes: Path, model: str, modes: list[str], repeat: int, file: Path | None) -> None:
    """Milliseconds per decode step of dummy weights, alone and of 32 sequences; prompt tokens per second. The file
    is written after each mode, so that a run cut short leaves what it found."""
    import run

    from foretell import LLM

    table: list[dict[str, Any]] = []
    result = {
        "bench": "gpu-fewer-bits", "model": model, "card": torch.cuda.get_device_name(),
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "rows": table,
    }  # fmt: skip
    for mode in modes:
        with LLM(str(shapes / model), **{**run.OPTIONS, **MODES[mode]}) as llm:
            found: dict[str, Any] = {"mode": mode, "weight_bytes": llm.assembly.weight_bytes}
            for name in ("decode-b1", "decode-b32", "prefill"):
                found[name] = run.measure(llm, model, name, repeat).measured
            used = run.show_ledger(llm)
            table.append(found | {"planned_bytes": used["planned"], "used_bytes": used["used"]})
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in table[-1].items()}, flush=True)
        if file:
            file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "rows": len(table)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--formats", default="bf16,int8,fp8,int4")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--end-to-end", type=Path, metavar="SHAPES")
    parser.add_argument("--modes", default=";".join(MODES))
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.end_to_end:
        modes = arguments.modes.split(";")
        end_to_end(arguments.end_to_end, arguments.model, modes, arguments.repeat, arguments.json)
        return
    rows, kernels = [int(n) for n in arguments.rows.split(",")], CudaKernels()
    a = torch.randn(1 << 28, device=DEVICE)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / (graph_us([lambda: torch.neg(a, out=b)] * 4) * 1e-6)
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e12:.2f} TB/s", flush=True)
    cases = []
    for name, (N, K, kind) in MODELS[arguments.model].linears().items():
        if name != "head":  # stays as it is
            weight = torch.randn(N, K, device=DEVICE).bfloat16() / K**0.5
            cases += [Case(kernels, name, weight, kind, kept_as) for kept_as in arguments.formats.split(",")]
    if arguments.search:
        compile_all([case for case in cases if case.format != "bf16"], rows)
    table = []
    for case in cases:
        for count in rows:
            us, how = case.us(case.inputs(count)), ""
            if arguments.search and case.format != "bf16":
                best, how = search(case, count)
                how = f"table {us:.1f}; best {how}"
                us = min(us, best)
            table.append(Row(case.name, case.format, count, case.floor_us(count, rate), us, how))
            print(table[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n")
    print(json.dumps({"bench": "gpu-quantised", "copy_bytes_per_second": rate, "rows": len(table)}))


if __name__ == "__main__":
    main()
