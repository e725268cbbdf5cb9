"""Two GPUs: tensor parallelism, a pipeline, replicas, beside one GPU in the same run; floor, measurement, ratio.

    python bench/gpu/several.py --shapes DIR [--layouts sums,one,tp,pp,replicas] [--repeat 3] [--json FILE]

Requests, dummy weights and the way a step is timed are those of bench/gpu/run.py. A floor is one GPU's divided by the
number of GPUs: what each has to read and compute, with nothing said between them. ``sums`` times one sum over the
ranks by itself. A pipeline holds twice the sequences of one GPU, since its memory does. Replicas are processes of a
GPU each that begin together, once with all requests each (so twice the load), once with half of them.
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

MODEL = "llama-3.1-8b"
# (layout, workload) → vLLM 0.25.1 on two H200s, our bar
TABLE = {
    ("tp", "decode-b1"): (3.48, 2.9),
    ("tp", "decode-b32"): (3.83, 3.3),
    ("tp", "prefill"): (68.9e3, 72e3),
    ("tp", "offline-1024"): (21.1e3, 23e3),
}
PIPELINE = {"pp": 2, "max_num_seqs": 1024}
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
    lines = started[0].communicate(timeout=120)[0].splitlines()
    print("\n".join(lines), flush=True)
    return lines


def run(layout: str, path: str, workloads: list[str], repeat: int, **options: Any) -> list[Row]:
    rows = []
    with LLM(path, **{**OPTIONS, **options}) as llm:
        print(layout, options, {k: round(v, 2) for k, v in llm.assembly.phases.items()}, flush=True)
        show_ranks(llm)
        for name in (each for each in workloads for _ in range(2 if each.startswith("offline") else 1)):
            row, gpus = measure(llm, MODEL, name, repeat), options.get("tp", 1) * options.get("pp", 1)
            rival, bar = TABLE.get((layout, name), (None, None))
            floor = row.floor / gpus if row.unit == "ms" else row.floor * gpus
            rows.append(replace(row, model=f"{MODEL} {layout}", floor=floor, rival=rival, bar=bar, aim=None))
            print(rows[-1].line(), flush=True)
    return rows


def show_ranks(llm: LLM) -> None:
    from foretell.executor.parallel import ParallelExecutor, ready_of

    executor = llm.assembly.engine.executor
    if isinstance(executor, ParallelExecutor):
        for ready in ready_of(executor.ranks):
            phases = {k: round(v, 2) for k, v in ready.phases.items()}
            print("  rank:", phases, {k: round(v / 2**30, 2) for k, v in ready.ledger.items()}, flush=True)


def replica(path: str, share: int, repeat: int) -> None:
    """In a process of its own: ready, and then so many timed runs, each when told to go."""
    from foretell.benchmark.setup import greedy_params
    from foretell.trace.workloads import named_workload

    with LLM(path, **OPTIONS) as llm:
        touch_every_size(llm)
        workload = named_workload("offline-1024", llm.spec.vocab_size)
        params = greedy_params(workload)
        chosen = [i for i in range(len(params)) if share < 0 or i % 2 == share]
        prompts = [workload.token_ids(i, llm.spec.vocab_size) for i in chosen]
        for _ in range(repeat):
            print("ready", flush=True)
            sys.stdin.readline()
            started = time.time()
            outputs = llm.generate(prompts, [params[i] for i in chosen], progress=False)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            print(json.dumps((started, time.time(), tokens)), flush=True)


def replicas(path: str, gpus: int, split: bool) -> float:
    """Output tokens a second of all together."""
    started = []
    for gpu in range(gpus):
        command = [sys.executable, __file__, "--replica", str(gpu % 2 if split else -1), "--path", path]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        started.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
    for process in started:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None, "a replica has ended"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.stdout.readline()) for process in started if process.stdout is not None]
    for process in started:
        process.wait(30)
    begun, ended = min(f[0] for f in found), max(f[1] for f in found)
    return float(sum(f[2] for f in found) / (ended - begun))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", type=Path)
    parser.add_argument("--layouts", default="sums,one,tp,pp,replicas")
    parser.add_argument("--workloads", default="")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pp-options", default="[{}]", help="a JSON list of changes to try, one after the other")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--replica", type=int)
    parser.add_argument("--path")
    arguments = parser.parse_args()
    if arguments.replica is not None:
        replica(arguments.path, arguments.replica, 1)
        return
    path = str(arguments.shapes / MODEL)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), **versions()}
    rows: list[Row] = []
    wanted = [name for name in arguments.workloads.split(",") if name]
    for layout in arguments.layouts.split(","):
        if layout == "sums":
            result["sums"] = sums(Path("/tmp"))
        elif layout == "one":
            rows += run("one", path, wanted or ["offline-1024"], arguments.repeat)
            if not wanted:  # as many sequences as the pipeline
                rows += run("one", path, ["offline-1024"], arguments.repeat, max_num_seqs=PIPELINE["max_num_seqs"])
        elif layout == "tp":
            names = wanted or [name for kind, name in TABLE if kind == "tp"]
            rows += run("tp", path, names, arguments.repeat, tp=2)
        elif layout == "pp":
            for more in json.loads(arguments.pp_options):
                rows += run("pp", path, wanted or ["offline-1024"], arguments.repeat, **{**PIPELINE, **more})
        elif layout == "replicas":
            each = {
                "one": replicas(path, 1, False),
                "two": replicas(path, 2, False),
                "split": replicas(path, 2, True),
            }
            result["replicas"] = each
            print({k: round(v) for k, v in each.items()}, f"× {each['two'] / each['one']:.3f}", flush=True)
        result["rows"] = [row.as_dict() for row in rows]
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    held = sum(row.held is True for row in rows)
    print(json.dumps({"bench": "gpu-several", "rows": len(rows), "held": held}))


if __name__ == "__main__":
    main()
