"""How well runs are foretold: model × workload × policy × load that no fit has seen, engine beside simulator.

    python bench/predictions.py [--models NAME …] [--profiles FOLDER] [--cells 8] [--runs 3] [--seed N]

Theory first: what the simulator says of every cell, before anything runs. Then the cells, ``--runs`` times each, in
turn, each between two reference requests (one sequence alone, 128 tokens in, 16 out), which tell a slow machine from
a wrong model. An error is predicted ÷ measured - 1 at a percentile, its median over the runs, and it is given twice:
as foretold, and with every part of the profile scaled to the machine's speed at that run, by its reference requests.
A cell whose runs differ more than a bar has 1.5 times their spread for a bar. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foretell.async_llm import AsyncLLM
from foretell.benchmark.beside import COMPARED, PERCENTILES, foretold_request
from foretell.benchmark.online import run_open_loop, set_policy
from foretell.benchmark.simulate import simulate
from foretell.benchmark.tables import table
from foretell.config import PolicyName, SchedulerConfig
from foretell.core.messages import Batch, Result
from foretell.core.params import SamplingParams
from foretell.cost.named import open_profile
from foretell.cost.profile import Profile
from foretell.cost.refit import Scales
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
REFERENCE = (128, 16)  # tokens in and out
SHOWN = ("ttft_seconds.p50", "ttft_seconds.p99", "tpot_seconds.p50", "tpot_seconds.p99", "e2e_seconds.p50",
         "output_tokens_per_second")  # fmt: skip
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
    """Every real step beside its prediction, without any correction: by the clock, and by the CPU time of the
    engine's thread from one step's end to the next, host included, which others on the machine do not lengthen (of an
    engine of one thread only)."""

    def __init__(self, profile: Profile) -> None:
        self.cost = StepCost(profile)
        # kind, measured ÷ predicted by clock and by CPU time, relative bounds of the prediction
        self.found: list[tuple[str, float, float, float, float]] = []
        self._cpu = 0.0

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind in ("decode", "prefill"):
            own = [entry for entry in self.found if entry[0] == kind]
            for clock, at in (("clock", 1), ("cpu", 2)):
                if own:
                    found[f"{kind} by {clock}"] = self._of(own, at)
        return found

    def _of(self, own: Sequence[Any], at: int) -> dict[str, Any]:
        ratios = sorted(entry[at] for entry in own)
        return {
            "steps": len(own),
            "measured_over_predicted": [percentile(ratios, p) for p in (5, 50, 95)],
            "median_error": statistics.median(abs(1 / ratio - 1) for ratio in ratios),
            "inside_interval": sum(entry[3] <= entry[at] <= entry[4] for entry in own) / len(own),
            "median_width": statistics.median(entry[4] - entry[3] for entry in own),
        }

    def __call__(self, batch: Batch, result: Result) -> None:
        before, self._cpu = self._cpu, time.thread_time()
        estimate, seconds = self.cost.estimate(batch.chunks), result.finished - result.started
        if before:
            low, high = estimate.low / estimate.seconds, estimate.high / estimate.seconds
            cpu = (self._cpu - before) / estimate.seconds
            self.found.append((estimate.kind, seconds / estimate.device, cpu, low, high))


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


def reference(llm: AsyncLLM, profile: Profile) -> float:
    """How many times longer than foretold one request alone takes now."""
    params = SamplingParams(temperature=0, max_tokens=REFERENCE[1], ignore_eos=True, detokenize=False)
    output = llm.llm.generate([list(range(5, 5 + REFERENCE[0]))], params, progress=False)[0]
    said = foretold_request(profile, *REFERENCE)
    if said is None or said.tpot_seconds is None or output.metrics.e2e_seconds is None:
        raise SystemExit("the profile does not reach the reference request")
    return output.metrics.e2e_seconds / (said.ttft_seconds + (REFERENCE[1] - 1) * said.tpot_seconds)


@dataclass(frozen=True)
class Run:
    """One run of a cell: how slow the machine was, what was foretold of one so slow, and what was measured."""

    slowness: float
    at_speed: Report
    measured: Report


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
        reference(llm, profile)
        runs: list[list[Run]] = [[] for _ in cells]
        for _ in range(args.runs):
            for cell, own_runs in zip(cells, runs, strict=True):
                before = reference(llm, profile)
                set_policy(llm, cell.policy)
                measured = summarize(run_open_loop(llm, cell.workload).requests)
                slowness = (before + reference(llm, profile)) / 2
                scaled = Scales(*[slowness] * 5).applied(profile)
                own = SchedulerConfig(**{**asdict(config), "policy": cell.policy})
                own_runs.append(Run(slowness, virtual(scaled, own, blocks, cell.workload)[0], measured))
        return report(model, profile, cells, said, runs, steps)
    finally:
        llm.close()


def report(
    model: str,
    profile: Profile,
    cells: Sequence[Cell],
    said: Sequence[Report],
    runs: Sequence[Sequence[Run]],
    steps: Steps,
) -> dict[str, Any]:
    found = []
    for cell, predicted, own in zip(cells, said, runs, strict=True):
        middle, spread = measured_report([run.measured for run in own])
        raw = {name: figure(predicted, name) / middle[name] - 1 for name in figure_names() if middle[name]}
        at_speed = {name: statistics.median(_error(run, name) for run in own) for name in raw}
        slowness = [run.slowness for run in own]
        found.append({"cell": cell.label, "load": cell.load, "errors": raw, "errors_at_speed": at_speed,
                      "spread": spread, "measured": middle, "slowness": slowness})  # fmt: skip
    summary = {kind: summarise_errors(found, kind) for kind in ("errors", "errors_at_speed")}
    for kind, words in (("errors", "as foretold"), ("errors_at_speed", "at the machine's speed of each run")):
        print(f"\nerror, % (spread of runs), {words}")
        print(table(("", "slowness", "TTFT P50", "P99", "TPOT P50", "P99", "E2E P50", "tok/s"), [
            (entry["cell"], f"{statistics.median(entry['slowness']):.2f}",
             *(f"{100 * entry[kind][name]:+.1f} (±{50 * entry['spread'][name]:.0f})" for name in SHOWN))
            for entry in found
        ]))  # fmt: skip
        for metric, figures in summary[kind].items():
            bar, bar95 = BARS[metric]
            print(
                f"{metric}: median {100 * figures['median']:.1f} % (bar {100 * bar:.0f}), P95 "
                f"{100 * figures['p95']:.1f} % (bar {100 * bar95:.0f}); {100 * figures['held']:.0f} % of the figures "
                "within the larger bar or 1.5 × the spread"
            )
    live = steps.figures()
    for kind, one in live.items():
        low, middle50, high = one["measured_over_predicted"]
        print(
            f"{one['steps']} steps, {kind}: measured ÷ predicted P5 {low:.2f}, P50 {middle50:.2f}, P95 {high:.2f}; "
            f"{100 * one['inside_interval']:.0f} % within the interval, its median width "
            f"{100 * one['median_width']:.0f} %, median error {100 * one['median_error']:.1f} %"
        )
    return {"model": model, "profile": profile.created, "cells": found, "summary": summary, "steps": live}


def _error(run: Run, name: str) -> float:
    return figure(run.at_speed, name) / figure(run.measured, name) - 1


def summarise_errors(found: Sequence[dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """By metric: median and P95 of the absolute errors over cells and percentiles, and the share within its bar."""
    summary = {}
    for metric, (_, bar95) in BARS.items():
        values = [
            (abs(value), abs(value) <= max(bar95, 1.5 * entry["spread"][name]))
            for entry in found
            for name, value in entry[kind].items()
            if name.startswith(metric)
        ]
        ordered = sorted(value for value, _ in values)
        held = sum(within for _, within in values) / len(values)
        summary[metric] = {"median": percentile(ordered, 50), "p95": percentile(ordered, 95), "held": held}
    return summary


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
