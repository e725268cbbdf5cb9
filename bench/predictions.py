"""How well runs are foretold: model × workload × policy × load that no fit has seen, engine beside simulator.

    python bench/predictions.py [--models NAME …] [--profiles FOLDER] [--cells 8] [--runs 3] [--seed N]

Theory first: what the simulator says of every cell, before anything runs. Then the cells, ``--runs`` times each, in
turn, each after a reference step (one sequence decoding alone), which tells a slower machine from a wrong model. An
error is predicted ÷ measured - 1 at a percentile, the measured one being the median over the runs; a cell whose runs
differ more than a bar has 1.5 times their spread for a bar. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretell.async_llm import AsyncLLM
from foretell.benchmark.beside import COMPARED, PERCENTILES
from foretell.benchmark.online import run_open_loop, set_policy
from foretell.benchmark.simulate import simulate
from foretell.benchmark.tables import table
from foretell.config import PolicyName, SchedulerConfig
from foretell.core.messages import Batch, Result
from foretell.core.params import SamplingParams
from foretell.cost.named import open_profile
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.trace.arrivals import arrival_times
from foretell.trace.metrics import Report, percentile, summarize
from foretell.trace.workloads import Lengths, Workload, random_workload

WORKLOADS = {  # prompt and output lengths
    "chat": ("32-256", "32-128"),
    "summarise": ("256-1024", "16-48"),
    "write": ("16-64", "96-192"),
    "any": ("16-512", "16-128"),
}
POLICIES: tuple[PolicyName, ...] = ("prefill-first", "decode-first", "mixed")
LOADS = {"light": 0.4, "heavy": 0.95}  # of what the simulator says is possible
ENGINE = {"kv_cache_bytes": 1 << 30, "enable_prefix_caching": False}
BARS = {"tpot_seconds": (0.05, 0.12), "ttft_seconds": (0.10, 0.25), "output_tokens_per_second": (0.04, 0.10)}


@dataclass(frozen=True)
class Cell:
    """One question: this traffic, under this policy."""

    model: str
    name: str
    policy: PolicyName
    load: str
    rate: float
    workload: Workload

    @property
    def label(self) -> str:
        return f"{self.name}, {self.policy}, {self.load} ({self.rate:.2f}/s × {len(self.workload.requests)})"


class Steps:
    """Every real step beside its prediction, without any correction."""

    def __init__(self, profile: Profile) -> None:
        self.cost = StepCost(profile)
        self.found: list[tuple[str, float, bool, float]] = []  # kind, measured ÷ predicted, inside, relative width

    def __call__(self, batch: Batch, result: Result) -> None:
        estimate, seconds = self.cost.estimate(batch.chunks), result.finished - result.started
        share = estimate.device / estimate.seconds
        inside = estimate.low * share <= seconds <= estimate.high * share
        width = (estimate.high - estimate.low) / estimate.seconds
        self.found.append((estimate.kind, seconds / estimate.device, inside, width))

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in ("decode", "prefill"):
            own = [entry for entry in self.found if entry[0] == kind]
            if own:
                ratios = sorted(ratio for _, ratio, _, _ in own)
                found[kind] = {
                    "steps": len(own),
                    "measured_over_predicted": [percentile(ratios, p) for p in (5, 50, 95)],
                    "median_error": statistics.median(abs(1 / ratio - 1) for ratio in ratios),
                    "inside_interval": sum(entry[2] for entry in own) / len(own),
                    "median_width": statistics.median(entry[3] for entry in own),
                }
        return found


def capacity(profile: Profile, config: SchedulerConfig, blocks: tuple[int, ...], lengths: tuple[str, str]) -> float:
    """Requests per second of such lengths when there are always more waiting, by the simulator."""
    workload = random_workload(160, *map(Lengths.parse, lengths), 0)
    return len(workload.requests) / virtual(profile, config, blocks, workload)[1]


def virtual(
    profile: Profile, config: SchedulerConfig, blocks: tuple[int, ...], workload: Workload
) -> tuple[Report, float]:
    windows = [group.window for group in profile.spec.kv_groups]
    run = simulate(workload, profile.spec.vocab_size, config, blocks, windows, StepCost(profile))
    return summarize(run.requests), run.seconds


def choose_cells(
    model: str,
    profile: Profile,
    config: SchedulerConfig,
    blocks: tuple[int, ...],
    count: int,
    seconds: float,
    seed: int,
) -> list[Cell]:
    """A draw without repetition, light and heavy load in turn, each about ``seconds`` long."""
    rng = random.Random(seed)
    every = [(name, policy) for name in WORKLOADS for policy in POLICIES]
    cells = []
    for number, (name, policy) in enumerate(rng.sample(every * 2, min(count, 2 * len(every)))):
        load = ("light", "heavy")[number % 2]
        own = SchedulerConfig(**{**asdict(config), "policy": policy})
        rate = LOADS[load] * capacity(profile, own, blocks, WORKLOADS[name])
        requests = max(6, round(rate * seconds))
        workload = random_workload(requests, *map(Lengths.parse, WORKLOADS[name]), rng.randrange(1 << 30))
        workload = workload.arriving_at(arrival_times(requests, rate, seed=rng.randrange(1 << 30)))
        cells.append(Cell(model, name, policy, load, rate, workload))
    return cells


def reference_step(llm: AsyncLLM) -> float:
    """Seconds per token of one sequence alone."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    output = llm.llm.generate([list(range(5, 69))], params, progress=False)[0]
    return output.metrics.tpot_seconds or 0.0


def measured_report(reports: Sequence[Report]) -> tuple[dict[str, float], dict[str, float]]:
    """(median, spread) over the runs of each figure; spread = (largest - smallest) ÷ median."""
    middle, spread = {}, {}
    for name in figure_names():
        values = sorted(figure(report, name) for report in reports)
        middle[name] = statistics.median(values)
        spread[name] = (values[-1] - values[0]) / middle[name] if middle[name] else 0.0
    return middle, spread


def figure_names() -> list[str]:
    return [f"{name}.{column}" for name in COMPARED for column in PERCENTILES] + ["output_tokens_per_second"]


def figure(report: Report, name: str) -> float:
    metric, _, column = name.partition(".")
    return float(getattr(getattr(report, metric), column)) if column else float(getattr(report, metric))


def run_model(model: str, args: argparse.Namespace) -> dict[str, Any]:
    llm = AsyncLLM(model, **ENGINE, num_threads=args.threads)
    try:
        assembly = llm.llm.assembly
        path = args.profiles / f"{model}.json" if args.profiles else None
        profile = open_profile(path, llm.llm.spec, model=assembly.files.name)
        engine = assembly.engine
        config, blocks = engine.scheduler.config, engine.executor.num_blocks
        cells = choose_cells(model, profile, config, blocks, args.cells, args.seconds, args.seed)
        print(f"\n{model}, {assembly.weight_format}, profile of {profile.created}; seed {args.seed}")
        said = []
        for cell in cells:
            own = SchedulerConfig(**{**asdict(config), "policy": cell.policy})
            said.append(virtual(profile, own, blocks, cell.workload)[0])
            print(f"  {cell.label}: TTFT P50 {1e3 * said[-1].ttft_seconds.p50:.0f} ms, "
                  f"TPOT P50 {1e3 * said[-1].tpot_seconds.p50:.1f} ms foretold")  # fmt: skip
        steps = Steps(profile)
        engine.watcher = steps
        reference_step(llm)
        reports: list[list[Report]] = [[] for _ in cells]
        references: list[float] = []
        for _ in range(args.runs):
            for cell, own_reports in zip(cells, reports, strict=True):
                references.append(reference_step(llm))
                set_policy(llm, cell.policy)
                own_reports.append(summarize(run_open_loop(llm, cell.workload).requests))
        return report(model, profile, cells, said, reports, references, steps)
    finally:
        llm.close()


def report(
    model: str, profile: Profile, cells: Sequence[Cell], said: Sequence[Report], reports: Sequence[Sequence[Report]],
    references: Sequence[float], steps: Steps,
) -> dict[str, Any]:  # fmt: skip
    rows, found = [], []
    for cell, predicted, own in zip(cells, said, reports, strict=True):
        middle, spread = measured_report(own)
        off = {name: figure(predicted, name) / middle[name] - 1 for name in figure_names() if middle[name]}
        found.append({"cell": cell.label, "load": cell.load, "errors": off, "spread": spread, "measured": middle})
        shown = ("ttft_seconds.p50", "ttft_seconds.p99", "tpot_seconds.p50", "tpot_seconds.p99",
                 "e2e_seconds.p50", "output_tokens_per_second")  # fmt: skip
        rows.append((cell.label, *(f"{100 * off[n]:+.1f} (±{50 * spread[n]:.0f})" for n in shown)))
    print(table(("error, % (spread of runs)", "TTFT P50", "P99", "TPOT P50", "P99", "E2E P50", "tok/s"), rows))
    alone = StepCost(profile).estimate([_Token(76)]).seconds
    print(f"reference step: foretold {1e3 * alone:.2f} ms, measured {1e3 * min(references):.2f} … "
          f"{1e3 * max(references):.2f}, median {1e3 * statistics.median(references):.2f}")  # fmt: skip
    summary = {}
    for metric, (bar, bar95) in BARS.items():
        values, held = [], 0
        for entry in found:
            for name, value in entry["errors"].items():
                if name.startswith(metric):
                    values.append(abs(value))
                    held += abs(value) <= max(bar95, 1.5 * entry["spread"][name])
        values.sort()
        summary[metric] = {
            "median": percentile(values, 50),
            "p95": percentile(values, 95),
            "held": held / len(values),
        }
        print(f"{metric}: median error {100 * summary[metric]['median']:.1f} % (bar {100 * bar:.0f}), "
              f"P95 {100 * summary[metric]['p95']:.1f} % (bar {100 * bar95:.0f}); within bar or 1.5 × spread: "
              f"{100 * summary[metric]['held']:.0f} %")  # fmt: skip
    live = steps.figures()
    for kind, one in live.items():
        low, middle_, high = one["measured_over_predicted"]
        print(
            f"{one['steps']} {kind} steps: measured ÷ predicted P5 {low:.2f}, P50 {middle_:.2f}, P95 {high:.2f}; "
            f"{100 * one['inside_interval']:.0f} % within the interval, its median width "
            f"{100 * one['median_width']:.0f} %, median error {100 * one['median_error']:.1f} %"
        )
    return {"model": model, "profile": profile.created, "cells": found, "summary": summary, "steps": live,
            "reference_seconds": list(references), "reference_foretold_seconds": alone}  # fmt: skip


@dataclass(frozen=True)
class _Token:
    start: int
    length: int = 1
    sample: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--profiles", type=Path, help="a folder with MODEL.json; else each model's own")
    parser.add_argument("--cells", type=int, default=8, help="of each model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals in a cell")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 20)
    results = [run_model(model, args) for model in args.models]
    line = json.dumps({"bench": "predictions", "seed": args.seed, "runs": args.runs, "models": results})
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
