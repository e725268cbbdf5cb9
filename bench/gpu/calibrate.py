"""Calibrate models of dummy weights on this GPU, then run cells that the profiles have not seen; JSON files.

    python bench/gpu/calibrate.py --shapes DIR --out DIR [--models llama-3.1-8b,qwen3-0.6b]

DIR holds a folder per model with its config.json. Each profile goes to OUT/MODEL.json. The cells are named workloads
through ``LLM.generate``: what the simulator says of them, what they took, the error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from foretell import LLM
from foretell.benchmark.setup import greedy_params
from foretell.benchmark.simulate import simulate
from foretell.cost.calibrate import calibrate
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.trace.workloads import Lengths, Workload, random_workload

OPTIONS: dict[str, Any] = {
    "load_format": "dummy", "dtype": "bfloat16", "device": "cuda", "max_model_len": 16384, "max_num_seqs": 512,
    "enable_prefix_caching": False,
}  # fmt: skip
CELLS = {  # requests, prompt and output lengths: none of them is a point of the grid
    "alone": (1, "200", "300"),
    "few": (6, "100-700", "100-250"),
    "many": (96, "64-900", "40-220"),
    "long": (12, "5000-9000", "30-60"),
    "prompts": (24, "1000-5000", "1"),
}


def cells(longest: int) -> list[Workload]:
    """Those whose requests are of so many tokens at most."""
    found = []
    for seed, (name, (count, prompt, output)) in enumerate(CELLS.items()):
        workload = random_workload(count, Lengths.parse(prompt), Lengths.parse(output), 100 + seed)
        if max(request.prompt_len + request.output_len for request in workload.requests) <= longest:
            found.append(Workload(name, workload.description, workload.requests))
    return found


def foretold(llm: LLM, profile: Profile, workload: Workload) -> float:
    engine, windows = llm.assembly.engine, [group.window for group in llm.spec.kv_groups]
    return simulate(
        workload, llm.spec.vocab_size, engine.scheduler.config, engine.executor.num_blocks, windows,
        StepCost(profile), overlaps=profile.overlaps,
    ).seconds  # fmt: skip


def measured(llm: LLM, workload: Workload, repeat: int) -> list[float]:
    prompts = [workload.token_ids(i, llm.spec.vocab_size) for i in range(len(workload.requests))]
    walls = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        llm.generate(prompts, greedy_params(workload), progress=False)
        walls.append(time.perf_counter() - started)
    return walls[1:]


def run(path: Path, out: Path, repeat: int) -> dict[str, Any]:
    context = json.loads((path / "config.json").read_text())["max_position_embeddings"]
    llm = LLM(str(path), **{**OPTIONS, "max_model_len": min(context, OPTIONS["max_model_len"])})
    try:
        started = time.perf_counter()
        profile = calibrate(llm)
        seconds = time.perf_counter() - started
        profile.save(out / f"{path.name}.json")
        print(f"{path.name}: calibrated in {seconds:.0f} s on {profile.hardware}; held-out median error "
              f"{100 * profile.median_error:.1f} %, {profile.intervals}", flush=True)  # fmt: skip
        found = []
        for workload in cells(llm.assembly.max_model_len):
            said = foretold(llm, profile, workload)
            walls = measured(llm, workload, repeat)
            wall = statistics.median(walls)
            found.append({"cell": workload.name, "foretold": said, "walls": walls, "error": said / wall - 1})
            print(f"  {workload.name}: foretold {said:.3f} s, took {wall:.3f} s ({100 * (said / wall - 1):+.1f} %)",
                  flush=True)  # fmt: skip
        return {"model": path.name, "seconds": seconds, "cells": found}
    finally:
        llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="qwen3-0.6b,llama-3.1-8b")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    results = [run(args.shapes / name, args.out, args.repeat) for name in args.models.split(",")]
    line = json.dumps({"bench": "calibrate", "models": results})
    (args.out / "cells.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
