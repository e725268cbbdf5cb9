"""Two GPUs: tensor parallelism, a pipeline, replicas, beside one GPU in the same run; floor, measurement, ratio.

    python bench/gpu/several.py --shapes DIR [--layouts sums,one,tp,pp,replicas] [--repeat 3] [--json FILE]

Requests, dummy weights and the way a step is timed are those of bench/gpu/run.py. A floor is one GPU's divided by the
number of GPUs: what each has to read and compute, with nothing said between them. ``sums`` times one sum over the
ranks by itself. Several GPUs hold up to 1024 sequences, one 512 and then 1024. Replicas are processes of a GPU each:
one runs its requests alone, then all together, then another alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.run import OPTIONS, Row, measure, touch_every_size, versions
from foretell import LLM
from foretell.executor.parallel import ParallelExecutor, ready_of

MODEL = "llama-3.1-8b"
# (layout, workload) → vLLM 0.25.1 on two H200s, our bar
TABLE = {
    ("tp", "decode-b1"): (3.48, 2.9),
    ("tp", "decode-b32"): (3.83, 3.3),
    ("tp", "prefill"): (68.9e3, 72e3),
    ("tp", "offline-1024"): (21.1e3, 23e3),
}
MANY = {"max_num_seqs": 1024}  # two GPUs have the memory for that
SUMS = """
import os, sys, torch, torch.distributed as dist
from foretell.parallel.inbox import make_inbox
rank = int(sys.argv[1]); device = torch.device("cuda", rank); torch.cuda.set_device(device)
dist.init_process_group("nccl", init_method="file://" + sys.argv[2], rank=rank, world_size=2, device_id=device)
inbox = make_inbox(dist.group.WORLD, device)
def timed(work, times=50):
    for _ in range(3): work()
    torch.cuda.synchronize(); dist.barrier(); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(times): work()
    found = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier(); start.record(); graph.replay(); end.record(); torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / times)
    return sorted(found)[len(found) // 2]
if rank == 0 and inbox is None: print("no peer memory: NCCL alone", flush=True)
for rows in (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096):
    x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.ones(4096, device=device)
    line = {"rows": rows, "floor_us": 1e6 * x.nbytes / 450e9, "nccl_us": timed(lambda: dist.all_reduce(x.clone()))}
    x.normal_()
    from foretell.parallel import inbox as ways
    few = ways.FEW_BYTES
    if inbox is not None and x.nbytes <= few: line["numbered_us"] = timed(lambda: inbox.sum(x))
    if inbox is not None and inbox.takes(x):
        ways.FEW_BYTES = 0
        for size, name in ((1024, "flags1_us"), (2048, "flags2_us")):
            ways.BLOCK_MANY = size
            line[name] = timed(lambda: inbox.sum(x))
        ways.FEW_BYTES, ways.BLOCK_MANY = few, 2048
    if inbox is not None and inbox.norms(x):
        line["with_norm_us"] = timed(lambda: inbox.sum_add_norm(x, x, weight, 1e-5))
    if rank == 0: print({k: round(v, 2) for k, v in line.items()}, flush=True)
os._exit(0)
"""


def sums(folder: Path) -> list[str]:
    store = folder / f"sums-{os.getpid()}"
    command = [sys.executable, "-c", SUMS]
    started = [
        subprocess.Popen([*command, str(rank), str(store)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    told = [process.communicate(timeout=120)[0] for process in started]
    lines = told[0].splitlines()
    print("\n".join(lines), flush=True)
    return lines


def run(layout: str, path: str, workloads: list[str], repeat: int, runs: int = 2, **options: Any) -> list[Row]:
    rows = []
    with LLM(path, **{**OPTIONS, **options}) as llm:
        print(layout, options, {k: round(v, 2) for k, v in llm.assembly.phases.items()}, flush=True)
        show_ranks(llm)
        for name in (each for each in workloads for _ in range(runs if each.startswith("offline") else 1)):
            row, gpus = measure(llm, MODEL, name, repeat), options.get("tp", 1) * options.get("pp", 1)
            rival, bar = TABLE.get((layout, name), (None, None))
            floor = row.floor / gpus if row.unit == "ms" else row.floor * gpus
            rows.append(replace(row, model=f"{MODEL} {layout}", floor=floor, rival=rival, bar=bar, aim=None))
            print(rows[-1].line(), flush=True)
        show_used(llm)
    return rows


def show_used(llm: LLM) -> None:
    """What is planned of the first GPU's memory, and what the driver says is in use."""
    executor, ledger = llm.assembly.engine.executor, llm.assembly.ledger
    planned = ledger.planned_bytes if ledger is not None else sum(ready_of(executor.ranks)[0].ledger.values())
    print(f"  planned {planned / 2**30:.2f} GiB, in use {used_gib()}", flush=True)


def used_gib() -> list[float]:
    """Of each GPU, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [round(int(line) / 1024, 2) for line in lines]


def show_ranks(llm: LLM) -> None:
    executor = llm.assembly.engine.executor
    if isinstance(executor, ParallelExecutor):
        for ready in ready_of(executor.ranks):
            phases = {k: round(v, 2) for k, v in ready.phases.items()}
            print("  rank:", phases, {k: round(v / 2**30, 2) for k, v in ready.ledger.items()}, flush=True)


def replica(path: str, requests: int) -> None:
    """In a process of its own: ready, and then a timed run of so many requests each time it is told to go."""
    from foretell.benchmark.setup import greedy_params
    from foretell.trace.workloads import named_workload

    with LLM(path, **OPTIONS) as llm:
        touch_every_size(llm)
        workload = named_workload("offline-1024", llm.spec.vocab_size)
        params = greedy_params(workload)[:requests]
        prompts = [workload.token_ids(i, llm.spec.vocab_size) for i in range(len(params))]
        llm.generate(prompts, greedy_params(workload, 8)[:requests], progress=False)
        print("ready", flush=True)
        while sys.stdin.readline():
            started = time.time()
            outputs = llm.generate(prompts, params, progress=False)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            print(json.dumps((started, time.time(), tokens)), flush=True)


def replicas(path: str, gpus: int, requests: int) -> dict[str, float]:
    """Output tokens a second of one process alone, and then of all together, each with as many requests."""
    started = []
    for gpu in range(gpus):
        command = [sys.executable, __file__, "--replica", str(requests), "--path", path]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        started.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
    for process in started:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, "a replica has ended"
    found = {"one": together(started[:1]), "all": together(started), "again one": together(started[-1:])}
    print(f"  in use {used_gib()} GiB", flush=True)
    for process in started:
        process.communicate(timeout=30)
    return found


def together(processes: list[subprocess.Popen[str]]) -> float:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]
    return float(sum(f[2] for f in found) / (max(f[1] for f in found) - min(f[0] for f in found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=Path)
    parser.add_argument("--layouts", default="sums,one,tp,pp,replicas")
    parser.add_argument("--workloads", default="")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pp-options", default="[{}]", help="a JSON list of changes to try, one after the other")
    parser.add_argument("--offline-runs", type=int, default=2)
    parser.add_argument("--requests", type=int, default=1024, help="of each replica")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--replica", type=int)
    parser.add_argument("--path")
    arguments = parser.parse_args()
    if arguments.replica is not None:
        replica(arguments.path, arguments.replica)
        return
    path = str(arguments.shapes / MODEL)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), **versions()}
    rows: list[Row] = []
    wanted = [name for name in arguments.workloads.split(",") if name]
    for layout in arguments.layouts.split(","):
        if layout == "sums":
            result["sums"] = sums(Path("/tmp"))
        elif layout == "one":
            rows += run("one", path, wanted or ["offline-1024"], arguments.repeat, arguments.offline_runs)
            if not wanted:
                rows += run("one", path, ["offline-1024"], arguments.repeat, arguments.offline_runs, **MANY)
        elif layout == "tp":
            names = wanted or [name for kind, name in TABLE if kind == "tp"]
            rows += run("tp", path, names, arguments.repeat, arguments.offline_runs, tp=2, **MANY)
        elif layout == "pp":
            for more in json.loads(arguments.pp_options):
                rows += run(
                    "pp",
                    path,
                    wanted or ["offline-1024"],
                    arguments.repeat,
                    arguments.offline_runs,
                    pp=2,
                    **{**MANY, **more},
                )
        elif layout == "replicas":
            each = result["replicas"] = replicas(path, 2, arguments.requests)
            gain = 2 * each["all"] / (each["one"] + each["again one"])
            print({k: round(v) for k, v in each.items()}, f"× {gain:.3f}", flush=True)
        result["rows"] = [row.as_dict() for row in rows]
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    held = sum(row.held is True for row in rows)
    print(json.dumps({"bench": "gpu-several", "rows": len(rows), "held": held}))


if __name__ == "__main__":
    main()
