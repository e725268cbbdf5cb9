"""Loading a sharded safetensors checkpoint onto a GPU, beside what page cache and bus give.

    python bench/gpu/loading.py --shape DIR/llama-3.1-8b --work /tmp/checkpoint [--shards 4] [--fresh 2] [--grid]

Writes a checkpoint of random weights in the model's shape (bfloat16, 16 GB for an 8B model), or without ``--shape``
takes what is there, then loads it. The floor is the slower of reading the files into pinned memory with 16 threads
and copying pinned memory to the device. ``--fresh``: so many first loads, each in a new process, and what everybody
did when. ``--grid`` tries other numbers of carriers, sizes of pieces and windows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from load_watch import lines, moments, of_a_carrier, of_the_planner, watched
from safetensors.torch import save_file

from foretell.kernels import get_kernels
from foretell.model import carriers, lanes
from foretell.model.families import tensor_naming
from foretell.model.lanes import Parcel, Piece
from foretell.model.load import load_model, spec_for
from foretell.store import resolve

DEVICE = torch.device("cuda")
PIECE = 16 << 20
CARRIERS, PIECES_MIB, WINDOWS_GIB = (8, 12, 16), (8, 16), (0.5, 1, 2, 4)


def write_checkpoint(shape: Path, work: Path, shards: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(shape / "config.json", work / "config.json")
    spec = spec_for(resolve(str(shape)))
    places = tensor_naming(spec).sources(spec, ()).values()
    tensors, weight_map = {place.name: place.shape for place in places}, {}
    ordered = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        made = {}
        for name in ordered[shard::shards]:
            values = torch.randn(tensors[name], device=DEVICE, dtype=torch.bfloat16) * 0.02
            made[name] = values.cpu()
            weight_map[name] = file
        save_file(made, work / file)
    (work / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def files_of(work: Path) -> list[Path]:
    return sorted(work.glob("*.safetensors"))


def read_rate(work: Path) -> float:
    """Bytes per second from the files into pinned memory, 16 threads."""
    pieces = [(file, at) for file in files_of(work) for at in range(0, file.stat().st_size, PIECE)]
    pinned = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(16)]

    def read(lane: int) -> None:
        view = memoryview(pinned[lane].numpy())
        for file, at in pieces[lane::16]:
            with open(file, "rb", buffering=0) as handle:
                os.preadv(handle.fileno(), [view], at)

    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))
    return sum(file.stat().st_size for file in files_of(work)) / (time.perf_counter() - started)


def bus_rate() -> float:
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device=DEVICE)
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    return 4 * pinned.nbytes / (time.perf_counter() - started)


def carrying_rate(work: Path, count: int) -> float:
    """Bytes per second of so many lanes that share the files' pieces, nothing else being done: reading and copying
    share the machine's memory, so this is less than either."""
    size, files = lanes.PIECE_BYTES, [os.open(file, os.O_RDONLY) for file in files_of(work)]
    pieces = [(file, at) for file in files for at in range(0, os.fstat(file).st_size - size, size)]
    target = torch.empty(count * size, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()

    def carry(number: int) -> None:
        bring, own = lanes.lane_to(DEVICE), target[number * size : (number + 1) * size]
        for file, at in pieces[number::count]:
            bring(Piece(Parcel(work, at, size), file, at, own))

    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(carry, range(count)))
    seconds = time.perf_counter() - started
    for file in files:
        os.close(file)
    return len(pieces) * size / seconds


def load(work: Path, *, tell: int = 1) -> dict[str, Any]:
    """Its seconds and, for ``tell`` 1, a line about it; for 2, all about it."""
    files = resolve(str(work))
    spec, kernels = spec_for(files), get_kernels(device="cuda")
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    with watched() as spans:
        started = time.perf_counter()
        model = load_model(files, spec, kernels, torch.bfloat16, activation_dtype=torch.bfloat16, device=DEVICE)
        torch.cuda.synchronize()
        ended = time.perf_counter()
    seconds, when = ended - started, moments(spans, started)
    if tell:
        extra = torch.cuda.max_memory_allocated() - model.weight_bytes
        between = (when["last piece"] - when["first piece"]) / 1e3
        print(
            f"  {seconds:.3f} s, {model.weight_bytes / seconds / 1e9:.1f} GB/s; first piece after "
            f"{when['first piece']:.0f} ms, last {when['last piece']:.0f}, {model.weight_bytes / between / 1e9:.1f} "
            f"GB/s between them; memory beside weights {extra / 1e6:.0f} MB",
            *(lines(spans, started, ended) if tell == 2 else ()), sep="\n    ", flush=True,
        )  # fmt: skip
    return {
        "seconds": seconds, "moments_ms": when, "carrier_ms": of_a_carrier(spans, started, ended),
        "planner_ms": of_the_planner(spans),
    }  # fmt: skip


@contextmanager
def settings(count: int, piece_mib: float, window_gib: float) -> Iterator[None]:
    chosen = (
        (carriers, "CARRIERS", count), (carriers, "usable_cpus", lambda: count),
        (lanes, "PIECE_BYTES", int(piece_mib * (1 << 20))),
        (carriers, "WINDOW_BYTES", int(window_gib * (1 << 30))),
    )  # fmt: skip
    before = [getattr(module, name) for module, name, _ in chosen]
    for module, name, value in chosen:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(chosen, before, strict=True):
            setattr(module, name, value)


def grid(work: Path, total: int) -> list[dict[str, Any]]:
    """Every combination with the usual window, then the usual combination with every window."""
    usual, window = (carriers.CARRIERS, lanes.PIECE_BYTES / (1 << 20)), carriers.WINDOW_BYTES / (1 << 30)
    tried = [(*each, window) for each in product(CARRIERS, PIECES_MIB)]
    table = []
    for count, piece, width in tried + [(*usual, width) for width in WINDOWS_GIB if width != window]:
        with settings(count, piece, width):
            seconds = [load(work, tell=0)["seconds"] for _ in range(4)]
            alone = max(carrying_rate(work, count) for _ in range(2))
        row = {"carriers": count, "piece_mib": piece, "window_gib": width, "seconds": seconds}
        table.append({**row, "bytes_per_second": total / min(seconds), "carrying_bytes_per_second": alone})
        print(
            f"{count:2} carriers, {piece:2g} MiB, window {width:g} GiB: {min(seconds):.3f} s, "
            f"{total / min(seconds) / 1e9:.1f} GB/s (all: {', '.join(f'{s:.2f}' for s in seconds)}); "
            f"carrying alone {alone / 1e9:.1f}",
            flush=True,
        )
    return table


def fresh(work: Path) -> dict[str, Any]:
    """The first load of a new process."""
    command = [sys.executable, __file__, "--work", str(work), "--first"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    told, _, found = done.stdout.rstrip().rpartition("\n")
    print(f"a new process:\n{told}", flush=True)
    return dict(json.loads(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--fresh", type=int, default=0)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work
    torch.zeros(1, device=DEVICE)
    if arguments.first:
        gc.collect()
        gc.freeze()  # as the engine does before it loads
        print(json.dumps(load(work, tell=2)))
        return
    if arguments.shape:
        write_checkpoint(arguments.shape, work, arguments.shards)
    total = sum(file.stat().st_size for file in files_of(work))
    read, bus = max(read_rate(work) for _ in range(3)), bus_rate()
    floor = min(read, bus)
    print(f"{total / 1e9:.1f} GB; files → pinned {read / 1e9:.1f} GB/s, pinned → device {bus / 1e9:.1f}", flush=True)
    first = [fresh(work) for _ in range(arguments.fresh)]
    print("one process, again and again:")
    loads = [load(work, tell=1 + (number == 4)) for number in range(5)]
    seconds = [each["seconds"] for each in loads]
    table = grid(work, total) if arguments.grid else []
    told = ", ".join(f"{total / each['seconds'] / floor:.0%}" for each in first)
    print(f"of the floor: {total / min(seconds) / floor:.0%}; first loads {told or 'not timed'}")
    result = {
        "bench": "gpu-loading", "card": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "bytes": total, "read_bytes_per_second": read, "bus_bytes_per_second": bus, "seconds": seconds,
        "first": first, "bytes_per_second": total / min(seconds), "of_floor": total / min(seconds) / floor,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result | {"torch": torch.__version__, "grid": table}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
