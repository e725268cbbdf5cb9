"""Loading a sharded safetensors checkpoint onto a GPU, beside what page cache and bus give.

    python bench/gpu/loading.py --shape DIR/llama-3.1-8b --work /tmp/checkpoint [--shards 4]

Writes a checkpoint of random weights in the model's shape (bfloat16, 16 GB for an 8B model), then loads it in this
process. The floor is the slower of reading the files into pinned memory with 16 threads and copying pinned memory to
the device. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from foretell.config import ModelSpec
from foretell.kernels import Kernels, get_kernels
from foretell.model import device_weights
from foretell.model.families import tensor_naming
from foretell.model.load import load_model, spec_for
from foretell.progress import loading_bar
from foretell.store import ModelFiles, resolve

DEVICE = torch.device("cuda")
PIECE = 16 << 20


def write_checkpoint(shape: Path, work: Path, shards: int) -> int:
    """Bytes written."""
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(shape / "config.json", work / "config.json")
    spec = spec_for(resolve(str(shape)))
    names = tensor_naming(spec).sources(spec, set(all_names(spec)))
    tensors = {place.name: place.shape for place in names.values()}
    weight_map, total = {}, 0
    ordered = sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        made = {}
        for name in ordered[shard::shards]:
            values = torch.randn(tensors[name], device=DEVICE, dtype=torch.bfloat16) * 0.02
            made[name] = values.cpu()
            weight_map[name] = file
            total += made[name].nbytes
        save_file(made, work / file)
    (work / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def all_names(spec: object) -> list[str]:
    """Publishers' names of a llama model."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names += [f"model.layers.{i}.{p}.weight" for i in range(spec.num_layers) for p in parts]  # type: ignore[attr-defined]
    return names


def read_rate(work: Path) -> float:
    """Bytes per second from the files into pinned memory, 16 threads."""
    pieces = [
        (file, at) for file in sorted(work.glob("*.safetensors")) for at in range(0, file.stat().st_size, PIECE)
    ]
    pinned = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(16)]
    total = sum(file.stat().st_size for file in work.glob("*.safetensors"))

    def read(lane: int) -> None:
        view = memoryview(pinned[lane].numpy())
        for file, at in pieces[lane::16]:
            with open(file, "rb", buffering=0) as handle:
                os.preadv(handle.fileno(), [view], at)

    started = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))
    return total / (time.perf_counter() - started)


def both_rate(work: Path, piece: int, lanes: int) -> float:
    """Bytes per second from the files through pinned memory to the device, nothing else being done: reading and
    copying share the machine's memory, so this is less than either."""
    files = sorted(work.glob("*.safetensors"))
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, piece)]
    target = torch.empty(lanes * piece, dtype=torch.uint8, device=DEVICE)

    def carry(lane: int) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        pinned = [torch.empty(piece, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        open_files = {file: os.open(file, os.O_RDONLY) for file in files}
        with torch.cuda.stream(stream):
            for number, (file, at) in enumerate(pieces[lane::lanes]):
                sent[number % 2].synchronize()
                buffer: Any = pinned[number % 2].numpy()
                os.preadv(open_files[file], [memoryview(buffer)], at)
                target[lane * piece : (lane + 1) * piece].copy_(pinned[number % 2], non_blocking=True)
                sent[number % 2].record(stream)
            stream.synchronize()
        for handle in open_files.values():
            os.close(handle)

    started = time.perf_counter()
    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(carry, range(lanes)))
    return sum(file.stat().st_size for file in files) / (time.perf_counter() - started)


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


def load(files: ModelFiles, spec: ModelSpec, kernels: Kernels) -> float:
    """Seconds."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    with loading_bar("loading") as report:
        load_model(
            files, spec, kernels, torch.bfloat16, lambda done, all_: report(2 * done, 2 * all_),
            activation_dtype=torch.bfloat16, device=DEVICE,
        )  # fmt: skip
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--pieces", default="", help="other sizes of pinned pieces to try, MiB")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    total = write_checkpoint(arguments.shape, arguments.work, arguments.shards)
    read, bus = max(read_rate(arguments.work) for _ in range(2)), bus_rate()
    print(
        f"{total / 1e9:.1f} GB; files → pinned {read / 1e9:.1f} GB/s, pinned → device {bus / 1e9:.1f} GB/s",
        flush=True,
    )
    files = resolve(str(arguments.work))
    spec, kernels = spec_for(files), get_kernels(device="cuda")
    seconds = []
    for _ in range(3):
        seconds.append(load(files, spec, kernels))
        print(f"loaded in {seconds[-1]:.2f} s: {total / 1e9 / seconds[-1]:.1f} GB/s", flush=True)
    usual = device_weights.PIECE_BYTES
    for piece in filter(None, arguments.pieces.split(",")):
        device_weights.PIECE_BYTES = size = int(float(piece) * (1 << 20))
        walls = [load(files, spec, kernels) for _ in range(3)]
        rates = [both_rate(arguments.work, size, lanes) / 1e9 for lanes in (8, 16, 24)]
        shown = ", ".join(f"{rate:.1f}" for rate in rates)
        print(f"pieces of {piece} MiB: {min(walls):.3f} s; nothing but carrying, 8, 16, 24 threads: {shown} GB/s")
    device_weights.PIECE_BYTES = usual
    rate, floor = total / min(seconds), min(read, bus)
    result = {
        "bench": "gpu-loading", "card": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "bytes": total, "read_bytes_per_second": read, "bus_bytes_per_second": bus,
        "seconds": seconds, "bytes_per_second": rate, "of_floor": rate / floor,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
