"""Every workload of the public tables on this GPU: floor, measurement, ratio; one JSON file.

    python bench/gpu/run.py --shapes DIR [--models a,b] [--workloads c,d] [--repeat 3] [--start-up] [--profile]

DIR holds a folder per model with its config.json. Weights are dummies, within ±1e-3, each layer's with memory
of its own; greedy; prefix caching off; all through ``LLM.generate``. A decode step is (median wall - median wall with
max_tokens=1) ÷ (output tokens - 1), after one full warm-up. The floor is bytes over 4.26 TB/s or operations over
788 TFLOP/s, whichever is larger, step by step (an H200's measured copy and bf16 product).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell import LLM, SamplingParams
from foretell.benchmark.offline import common_output_len
from foretell.benchmark.setup import greedy_params
from foretell.benchmark.simulate import simulate
from foretell.core.engine import Engine
from foretell.cost import FloorCost, Hardware
from foretell.trace.workloads import Workload, named_workload

H200 = Hardware(0, 4.26e12, {"float32": 60e12, "bfloat16": 788e12})
OPTIONS: dict[str, Any] = {
    "load_format": "dummy", "dtype": "bfloat16", "device": "cuda", "max_model_len": 16384, "max_num_seqs": 512,
    "enable_prefix_caching": False,
}  # fmt: skip
# (model, workload) → vLLM 0.25.1 on an H200, our bar, our aim; milliseconds per step or tokens per second
TABLE: dict[tuple[str, str], tuple[float | None, float | None, float | None]] = {
    ("llama-3.1-8b", "decode-b1"): (4.90, 4.2, 3.8),
    ("llama-3.1-8b", "decode-b32"): (5.58, 5.0, 4.5),
    ("llama-3.1-8b", "decode-b32-long"): (13.5, 13.0, 12.4),
    ("llama-3.1-8b", "prefill"): (40.8e3, 43e3, 46e3),
    ("llama-3.1-8b", "offline-1024"): (12.8e3, 13.5e3, 15.5e3),
    ("qwen3-0.6b", "decode-b1"): (1.70, 1.0, 0.6),
    ("qwen3-0.6b", "decode-b32"): (2.12, 1.3, 0.8),
    ("qwen3-0.6b", "offline-256"): (22.3e3, 26e3, 31e3),
    ("qwen3-0.6b", "prefill"): (346e3, 380e3, 450e3),
    ("gemma-3-1b", "decode-b1"): (1.86, 1.1, None),
    ("gemma-3-1b", "decode-b32"): (2.48, 1.5, None),
    ("gemma-3-1b", "prefill"): (336e3, 380e3, None),
    ("llama-2-7b", "decode-b1"): (None, None, None),
    ("llama-2-7b", "decode-b32"): (None, None, None),
    ("llama-2-7b", "prefill"): (None, None, None),
}
OF_FLOOR = {"decode-b1": 1.15, "decode-b32": 1.25, "prefill": 1.25}  # llama-2-7b's bars, as multiples of its floor
START = """
import json, time; t = time.time()
from foretell import LLM, SamplingParams
llm = LLM({path!r}, **{options!r})
out = llm.generate([[1000 + i for i in range(128)]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
print(json.dumps((time.time() - {spawned!r}, time.time() - t, llm.assembly.phases)))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``unit``: "ms" per decode step (less is better) or "tok/s"."""

    model: str
    workload: str
    unit: str
    floor: float
    measured: float
    rival: float | None
    bar: float | None
    aim: float | None
    walls_seconds: list[float]
    first_walls_seconds: list[float]
    host: dict[str, float]

    @property
    def over_floor(self) -> float:
        return self.measured / self.floor if self.unit == "ms" else self.floor / self.measured

    @property
    def held(self) -> bool | None:
        if self.bar is None:
            return None
        return self.measured <= self.bar if self.unit == "ms" else self.measured >= self.bar

    def line(self) -> str:
        def show(value: float | None) -> str:
            return "—" if value is None else f"{value:.2f}" if self.unit == "ms" else f"{value / 1e3:.1f}k"

        held = {None: "", True: "held", False: "MISSED"}[self.held]
        return (
            f"{self.model:14s} {self.workload:16s} {self.unit:6s} floor {show(self.floor):>7s}  measured "
            f"{show(self.measured):>7s}  ×floor {self.over_floor:5.2f}  vLLM {show(self.rival):>6s}  "
            f"bar {show(self.bar):>6s} {held:6s} aim {show(self.aim):>6s}  {self.host}"
        )

    def as_dict(self) -> dict[str, Any]:
        names = list(self.__slots__)
        return {**{name: getattr(self, name) for name in names}, "over_floor": self.over_floor, "held": self.held}


def measure(llm: LLM, model: str, name: str, repeat: int) -> Row:
    workload = named_workload(name, llm.spec.vocab_size)
    config = llm.assembly.engine.scheduler.config
    output_len = common_output_len(workload, config.max_num_seqs)
    prompts = [workload.token_ids(i, llm.spec.vocab_size) for i in range(len(workload.requests))]
    records: list[dict[str, Any]] = []

    def timed(limit: int | None = None) -> float:
        params = greedy_params(workload, limit)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - started
        for output, asked in zip(outputs, params, strict=True):
            done = output.outputs[0]
            assert (len(done.token_ids), done.finish_reason) == (asked.max_tokens, "length"), done.error
        return seconds

    if name.startswith("offline"):
        touch_every_size(llm)
        timed(limit=8)
        repeat = 1
    else:
        timed()
    first_walls = [timed(limit=1) for _ in range(repeat)] if output_len else []
    llm.assembly.engine.on_step = records.append
    walls = [timed() for _ in range(repeat)]
    llm.assembly.engine.on_step = None
    wall = statistics.median(walls)
    host = {
        "steps": len(records) / repeat,
        "launch_ms": 1e3 * statistics.fmean(r["parts"].get("launch", 0.0) for r in records),
        "wait_ms": 1e3 * statistics.fmean(r["parts"].get("wait", 0.0) for r in records),
    }
    host = {key: round(value, 3) for key, value in host.items()}
    floor = floor_seconds(llm, workload)
    rival, bar, aim = TABLE.get((model, name), (None, None, None))
    if output_len:
        first_floor = floor_seconds(llm, workload, 1)
        per_step = 1e3 / (output_len - 1)
        floor, value, unit = (
            (floor - first_floor) * per_step,
            (wall - statistics.median(first_walls)) * per_step,
            "ms",
        )
    else:
        tokens = workload.prompt_tokens if name == "prefill" else workload.output_tokens
        floor, value, unit = tokens / floor, tokens / wall, "tok/s"
    if model == "llama-2-7b":
        bar = floor * OF_FLOOR[name] if unit == "ms" else floor / OF_FLOOR[name]
    return Row(model, name, unit, floor, value, rival, bar, aim, walls, first_walls, host)


def touch_every_size(llm: LLM) -> None:
    """Decode with every number of sequences, so that each graph is there: a server's first minutes."""
    count = llm.assembly.engine.scheduler.config.max_num_seqs
    params = [SamplingParams(temperature=0, max_tokens=2 + i // 4, ignore_eos=True) for i in range(count)]
    llm.generate([[1000 + i] * 8 for i in range(count)], params, progress=False)


def profile_host(llm: LLM, name: str) -> None:
    """Where the engine thread's Python goes while it runs a workload's requests."""
    import cProfile
    import pstats

    workload = named_workload(name, llm.spec.vocab_size)
    params = greedy_params(workload, 20)
    requests = [(workload.token_ids(i, llm.spec.vocab_size), params[i]) for i in range(len(params))]

    def drive(engine: Engine) -> None:
        profiler, started = cProfile.Profile(), time.perf_counter()
        profiler.enable()
        for number, (prompt, own) in enumerate(requests):
            engine.add(10**9 + number, prompt, own)
        steps = 0
        while engine.has_work:
            engine.step()
            steps += 1
        profiler.disable()
        print(f"-- host, {name}: {steps} steps in {time.perf_counter() - started:.3f} s")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(28)

    llm.service.call(drive).result()


def floor_seconds(llm: LLM, workload: Workload, limit: int | None = None) -> float:
    """The workload through this scheduler if every step took what its bytes and operations must take."""
    engine, windows = llm.assembly.engine, [group.window for group in llm.spec.kv_groups]
    cost = FloorCost(llm.spec, H200, "bfloat16")
    blocks, config = engine.executor.num_blocks, engine.scheduler.config
    return simulate(workload, llm.spec.vocab_size, config, blocks, windows, cost, max_output_tokens=limit).seconds


def show_ledger(llm: LLM) -> dict[str, float]:
    """The plan beside what the driver says now."""
    import torch

    ledger = llm.assembly.ledger
    assert ledger is not None
    free, total = torch.cuda.mem_get_info()
    for name, size in ledger.entries.items():
        print(f"  {name:18s} {size / 2**30:8.3f} GiB")
    planned, used = ledger.planned_bytes, total - free
    print(f"  planned {planned / 2**30:.2f}, budget {ledger.budget_bytes / 2**30:.2f}, in use {used / 2**30:.2f} GiB")
    return {**ledger.entries, "planned": planned, "budget": ledger.budget_bytes, "used": used}


def profile(llm: LLM, names: list[str]) -> None:
    """Where the device's time goes, by kernel."""
    import torch

    for name in names:
        workload = named_workload(name, llm.spec.vocab_size)
        prompts = [workload.token_ids(i, llm.spec.vocab_size) for i in range(len(workload.requests))]
        limit = 33 if name.startswith("decode") else 1
        prompts = prompts if name.startswith("decode") else prompts[:8]
        params = greedy_params(workload, limit)[: len(prompts)]
        llm.generate(prompts, params, progress=False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            started = time.perf_counter()
            llm.generate(prompts, params, progress=False)
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
        found = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in found) / 1e6
        print(f"-- {name}: wall {wall:.3f} s, kernels {busy:.3f} s")
        for event in found[:22]:
            each = event.self_device_time_total / max(1, event.count)
            print(
                f"   {event.self_device_time_total / 1e3:9.2f} ms {event.count:6d} × {each:8.1f} µs  {event.key[:90]}"
            )


def start_up(path: str, runs: int = 2) -> list[dict[str, Any]]:
    """Fresh processes to their first token: the first with empty compile caches, then with what it left."""
    import os

    found = []
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        for number in range(runs):
            code = START.format(path=path, options=OPTIONS, spawned=time.time())
            out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
            if out.returncode:
                print(out.stderr[-2000:])
                return found
            seconds, inside, phases = json.loads(out.stdout.strip().splitlines()[-1])
            found.append({"seconds": seconds, "inside_seconds": inside, "phases": phases})
            shown = ", ".join(f"{k} {v:.2f}" for k, v in phases.items())
            print(f"start {number + 1}: {seconds:.1f} s to the first token ({shown})", flush=True)
    return found


def versions() -> dict[str, str]:
    import torch

    found = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=Path, required=True)
    parser.add_argument("--models", default="llama-3.1-8b,qwen3-0.6b,gemma-3-1b,llama-2-7b")
    parser.add_argument("--workloads", default="")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--start-up", action="store_true")
    parser.add_argument("--profile", default="", help="workloads to profile by kernel")
    parser.add_argument("--profile-host", default="", help="workloads whose Python is profiled")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--option", action="append", default=[], help="name=value for LLM")
    arguments = parser.parse_args()
    options = {**OPTIONS, **{k: json.loads(v) for k, v in (o.split("=", 1) for o in arguments.option)}}
    wanted = [name for name in arguments.workloads.split(",") if name]
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), **versions()}
    rows: list[Row] = []
    result["ledger"], result["start_up"] = {}, {}
    for model in arguments.models.split(","):
        path = str(arguments.shapes / model)
        if arguments.start_up:
            result["start_up"][model] = start_up(path)
        names = [name for m, name in TABLE if m == model and (not wanted or name in wanted)]
        if not (names or arguments.profile or arguments.profile_host):
            continue
        with tempfile.TemporaryDirectory() as folder, LLM(long_enough(path, folder), **options) as llm:
            print(model, {k: round(v, 2) for k, v in llm.assembly.phases.items()}, llm.assembly.kernels, flush=True)
            for name in names:
                rows.append(measure(llm, model, name, arguments.repeat))
                print(rows[-1].line(), flush=True)
            result["ledger"][model] = show_ledger(llm)
            if arguments.profile:
                profile(llm, arguments.profile.split(","))
            for name in filter(None, arguments.profile_host.split(",")):
                profile_host(llm, name)
        write(arguments.out, result, rows)
    held = sum(row.held is True for row in rows)
    print(json.dumps({"bench": "gpu", "rows": len(rows), "held": held}))


def long_enough(path: str, folder: str) -> str:
    """The model, or a copy in ``folder`` whose context holds the workloads: Llama 2's of 4096 does not."""
    config = json.loads((Path(path) / "config.json").read_text())
    if config.get("max_position_embeddings", 0) >= OPTIONS["max_model_len"]:
        return path
    (Path(folder) / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": OPTIONS["max_model_len"]})
    )
    return folder


def write(out: Path, result: dict[str, Any], rows: list[Row]) -> None:
    """After every model, so that a run cut short leaves what it found."""
    out.mkdir(parents=True, exist_ok=True)
    card, models = result["card"].split()[-1].lower(), "-".join(sorted({row.model for row in rows}))
    result["rows"] = [row.as_dict() for row in rows]
    (out / f"gpu-{card}-{result['date']}-{models}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
