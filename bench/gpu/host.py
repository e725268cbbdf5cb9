"""Python time of one decode step beside the device: schedule, launch, collect, update, deliver; no GPU needed.

    python bench/gpu/host.py [--rows 1,32,256,512] [--steps 200] [--profile]

The model and the graphs do nothing. There is no floor but zero; a step must stay under the device's own time.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from dataclasses import dataclass
from typing import Any

import torch

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.overlapped import OverlappedExecutor
from foretell.worker.device_runner import DeviceRunner


@dataclass
class Spec:
    vocab_size: int = 1000


class Nothing:
    """A model whose steps cost nothing, and the graph of them."""

    spec = Spec()
    embedding = head = None
    hidden = torch.zeros(8192, 8)
    scores = torch.zeros(8192, 1)

    def forward(self, token_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        return self.hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.scores[: len(hidden)]

    def size_for(self, rows: int) -> int:
        return rows

    def run(self, size: int, work: Any) -> torch.Tensor:
        return self.scores[:size]

    def release(self) -> None: ...


def measure(rows: int, steps: int, profile: bool) -> float:
    """Seconds per step."""
    config = SchedulerConfig(
        max_num_seqs=rows, max_num_batched_tokens=8192, max_model_len=4096, enable_prefix_caching=False
    )
    nothing: Any = Nothing()
    blocks = rows * 256
    runner = DeviceRunner(nothing, [], config, (blocks,), torch.device("cpu"), graphs=nothing)
    engine = Engine(config, OverlappedExecutor(runner, (blocks,)))
    for i in range(rows):
        engine.add(i, list(range(100 + i % 16)), SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True))
    for _ in range(30):
        engine.step()
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = (time.perf_counter() - started) / steps
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,32,256,512")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for rows in map(int, arguments.rows.split(",")):
        seconds = min(measure(rows, arguments.steps, False) for _ in range(3))
        found[rows] = round(1e3 * seconds, 4)
        print(f"{rows:4d} rows: {1e3 * seconds:7.3f} ms per step, {1e6 * seconds / rows:6.2f} µs per row", flush=True)
        if arguments.profile:
            measure(rows, arguments.steps, True)
    print(json.dumps({"bench": "gpu-host", "ms_per_step": found}))


if __name__ == "__main__":
    main()
