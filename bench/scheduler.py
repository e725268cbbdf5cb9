"""Python cost of one scheduling turn: N decoding requests, schedule + update, on the virtual executor.

    python bench/scheduler.py [--requests 256] [--steps 300]

There is no floor but zero: the bar is 1 ms for 256 requests. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.virtual import VirtualExecutor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    executor = VirtualExecutor(lambda batch: 0.01, (args.requests * 64,))
    config = SchedulerConfig(max_num_seqs=args.requests, max_num_batched_tokens=8192)
    engine = Engine(config, executor)
    for i in range(args.requests):
        prompt = [i * 1000 + j for j in range(100 + i % 100)]
        engine.add(i, prompt, SamplingParams(max_tokens=args.steps + 100))
    while any(r.in_prefill for r in engine.scheduler.requests.values()):
        engine.step()
    scheduled, updated = [], []
    for _ in range(args.steps):
        t0 = time.perf_counter()
        turn = engine.scheduler.schedule(executor.now)
        t1 = time.perf_counter()
        if turn is None or len(turn.batch.chunks) != args.requests:
            raise SystemExit("the batch does not hold every request")
        executor.submit(turn.batch)
        result = executor.wait(None)
        t2 = time.perf_counter()
        engine.scheduler.update(result)  # type: ignore[arg-type]
        scheduled.append(t1 - t0)
        updated.append(time.perf_counter() - t2)
    milliseconds = {
        "schedule_ms": statistics.median(scheduled) * 1e3,
        "update_ms": statistics.median(updated) * 1e3,
    }
    milliseconds["total_ms"] = sum(milliseconds.values())
    milliseconds["p99_ms"] = (
        sorted(a + b for a, b in zip(scheduled, updated, strict=False))[int(0.99 * args.steps)] * 1e3
    )
    print(f"{args.requests} decoding requests, medians of {args.steps} steps (bar: 1 ms in all)")
    for name, value in milliseconds.items():
        print(f"  {name:12} {value:.3f}")
    print(json.dumps({"bench": "scheduler", "requests": args.requests, **milliseconds}))


if __name__ == "__main__":
    main()
