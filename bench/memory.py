"""Predicted and measured memory of an engine on the CPU, by what the process really holds.

    python bench/memory.py [--models NAME …] [--profiles FOLDER|NAME] [--threads N] [--json FILE]

Theory first: the byte ledger of the model's profile (weights as they are kept, the process, activations, KV cache).
Then an engine in a process of its own fills its cache, computes a step of its whole token budget and a decode step of
all its sequences; what counts is the most anonymous memory that it held (RssAnon, looked at every 2 ms: mapped files
are the system's to take back). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

KV_BYTES = 512 << 20


def measure(model: str, profiles: str | None, threads: int | None) -> dict[str, Any]:
    """In this process: bytes by purpose as foretold, and the most that was held."""
    from foretell import LLM
    from foretell.cost.named import open_profile
    from foretell.cost.stepping import StepBench, rows
    from foretell.plan.memory import step_bytes

    with LLM(model, kv_cache_bytes=KV_BYTES, enable_prefix_caching=False, num_threads=threads) as llm:
        config = llm.assembly.engine.scheduler.config
        folder = profiles is not None and Path(profiles).is_dir()
        profile = open_profile(
            Path(str(profiles)) / f"{model}.json" if folder else profiles, llm.spec, model=llm.assembly.files.name
        )
        foretold = {
            "weights": profile.weight_bytes,
            "process": profile.process_bytes,
            "activations": step_bytes(llm.spec, config, 4),
            "KV cache": llm.assembly.kv_bytes,
        }
        bench, most, done = StepBench(llm), [0], threading.Event()

        def look() -> None:
            while not done.wait(0.002):
                most[0] = max(most[0], anonymous_bytes())

        def run(engine: object) -> None:
            bench.fill_cache()
            bench.seconds(bench.pieces(config.max_num_batched_tokens - 16))
            bench.seconds(rows(config.max_num_seqs, sample=True))

        watching = threading.Thread(target=look)
        watching.start()
        llm.service.call(run).result()
        done.set()
        watching.join()
        return {
            "model": model,
            "foretold": foretold,
            "measured": most[0],
            "weights_loaded": llm.assembly.weight_bytes,
        }


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--profiles", help="a folder with MODEL.json, or a name: cpu; else each model's own")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.models[0], args.profiles, args.threads)))
        return
    found = []
    for model in args.models:
        given = [x for name in ("profiles", "threads") if (v := getattr(args, name)) for x in (f"--{name}", str(v))]
        command = [sys.executable, __file__, "--child", "--models", model, *given]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        one = json.loads(out.splitlines()[-1])
        one["error"] = sum(one["foretold"].values()) / one["measured"] - 1
        found.append(one)
        parts = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in one["foretold"].items())
        print(f"{model}: {parts}: {sum(one['foretold'].values()) / 1e6:.0f} MB foretold, "
              f"{one['measured'] / 1e6:.0f} measured, error {100 * one['error']:+.1f} %")  # fmt: skip
    line = json.dumps({"bench": "memory", "kv_cache_bytes": KV_BYTES, "models": found})
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
