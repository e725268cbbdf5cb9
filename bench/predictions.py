"""How well runs are foretold: model × workload × policy × load that no fit has seen, engine beside simulator.

    python bench/predictions.py [--models NAME …] [--profiles FOLDER|NAME] [--cells 8] [--runs 3] [--seed N]
                                [--minutes 25] [--json FILE]

Theory first: what the simulator says of every cell, before anything runs. Then the cells, ``--runs`` times each, in
turn, each between two reference steps (those that calibration took), which tell a slow machine from a wrong model. An
error is predicted ÷ measured - 1 at a percentile, its median over the runs, and it is given twice: as foretold, and
with every part of the profile scaled to the machine's speed at that run, by its reference steps. A cell whose runs
differ more than a bar has 1.5 times their spread for a bar. The last line is JSON.

Draw the seed after profile and code are committed: the commit stands in the result. With ``--json FILE`` every run is
kept in FILE.partial as it ends; the same command goes on from there, also after ``--minutes``, when no other run
begins. What came out by then is reported with the number of runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from predictions_report import (
    Run,
    Steps,
    figure_names,
    figures_of,
    middle_and_spread,
    print_report,
    step_figures,
    summarise_errors,
)

from foretell.async_llm import AsyncLLM
from foretell.benchmark.online import run_open_loop, set_policy
from foretell.benchmark.simulate import simulate
from foretell.config import PolicyName, SchedulerConfig
from foretell.cost.named import open_profile
from foretell.cost.profile import Profile
from foretell.cost.refit import Scales
from foretell.cost.step import StepCost
from foretell.cost.stepping import REFERENCE, StepBench, decodes
from foretell.trace.arrivals import arrival_times
from foretell.trace.metrics import Report, summarize
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


def slowness(llm: AsyncLLM, profile: Profile) -> float:
    """How many times longer than at its calibration the machine's reference step takes now. The engine is idle."""
    found: list[float] = []
    llm.llm.service.call(lambda engine: found.append(StepBench(llm.llm).reference_seconds())).result()
    return found[0] / (profile.reference_seconds or StepCost(profile).estimate(decodes(*REFERENCE)).device)


class Subject:
    """A loaded model, its profile, its cells and what is foretold of them."""

    def __init__(self, model: str, args: argparse.Namespace) -> None:
        self.model = model
        self.llm = AsyncLLM(model, **ENGINE, num_threads=args.threads)
        assembly = self.llm.llm.assembly
        folder = args.profiles if args.profiles and Path(args.profiles).is_dir() else None
        name = Path(folder) / f"{model}.json" if folder else args.profiles
        self.profile = open_profile(name, self.llm.llm.spec, model=assembly.files.name)
        self.threads = args.threads or self.profile.num_threads
        self.config, self.blocks = assembly.engine.scheduler.config, assembly.engine.executor.num_blocks
        self.cells = choose_cells(model, self.profile, self.config, self.blocks, args.cells, args.seconds, args.seed)
        print(f"\n{model}, {assembly.weight_format}, profile of {self.profile.created}, {self.profile.hardware}")
        self.said = [figures_of(self._foretold(cell, self.profile)) for cell in self.cells]
        for cell, said in zip(self.cells, self.said, strict=True):
            print(f"  {cell.label}: TTFT P50 {1e3 * said['ttft_seconds.p50']:.0f} ms, "
                  f"TPOT P50 {1e3 * said['tpot_seconds.p50']:.1f} ms foretold")  # fmt: skip
        self.steps = Steps(self.profile)
        assembly.engine.watcher = self.steps

    def _foretold(self, cell: Cell, profile: Profile) -> Report:
        own = SchedulerConfig(**{**asdict(self.config), "policy": cell.policy})
        return virtual(profile, own, self.blocks, cell.workload)[0]

    def run(self, cell: Cell) -> Run:
        before = slowness(self.llm, self.profile)
        set_policy(self.llm, cell.policy)
        self.steps.taken()
        measured = summarize(run_open_loop(self.llm, cell.workload).requests)
        steps = self.steps.taken()
        slower = (before + slowness(self.llm, self.profile)) / 2
        at_speed = self._foretold(cell, Scales(*[slower] * 5).applied(self.profile))
        return Run(self.model, cell.label, slower, figures_of(at_speed), figures_of(measured), steps)


class Kept:
    """Runs that have ended, in a file beside the result, so that a run that was cut short can go on."""

    def __init__(self, file: Path | None, what: dict[str, Any]) -> None:
        self.file = None if file is None else file.with_name(f"{file.name}.partial")
        self.runs: list[Run] = []
        if self.file is None or not self.file.exists():
            self._write(what)
            return
        first, *lines = self.file.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != what:
            raise SystemExit(f"{self.file} is of another question ({first}): remove it, or ask the same")
        self.runs = [Run(**json.loads(line)) for line in lines]

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self._write(asdict(run))

    def of(self, model: str, cell: str) -> list[Run]:
        return [run for run in self.runs if (run.model, run.cell) == (model, cell)]


def take_runs(subjects: Sequence[Subject], kept: Kept, runs: int, until: float) -> None:
    """Every cell once, then again: what is missing of it, as long as there is time."""
    for number in range(runs):
        for subject in subjects:
            for cell in subject.cells:
                if len(kept.of(subject.model, cell.label)) > number:
                    continue
                if time.monotonic() > until:
                    return
                kept.add(subject.run(cell))
                print(f"  run {number + 1}, {subject.model}, {cell.label}: slowness {kept.runs[-1].slowness:.2f}",
                      flush=True)  # fmt: skip


def report(subject: Subject, kept: Kept) -> dict[str, Any]:
    found, steps = [], []
    for cell, predicted in zip(subject.cells, subject.said, strict=True):
        own = kept.of(subject.model, cell.label)
        if not own:
            continue
        middle, spread = middle_and_spread([run.measured for run in own])
        raw = {name: predicted[name] / middle[name] - 1 for name in figure_names() if middle[name]}
        at_speed = {
            name: statistics.median(run.at_speed[name] / run.measured[name] - 1 for run in own) for name in raw
        }
        steps += [step for run in own for step in run.steps]
        found.append({"cell": cell.label, "load": cell.load, "runs": len(own), "errors": raw,
                      "errors_at_speed": at_speed, "spread": spread, "measured": middle, "foretold": predicted,
                      "slowness": [run.slowness for run in own]})  # fmt: skip
    summary = {kind: summarise_errors(found, kind) for kind in ("errors", "errors_at_speed")} if found else {}
    live = step_figures(steps, subject.threads)
    print_report(subject.model, found, summary, live)
    return {"model": subject.model, "profile": subject.profile.created, "hardware": subject.profile.hardware,
            "cells": found, "summary": summary, "steps": live}  # fmt: skip


def commit() -> str:
    """Of the working tree, marked where it has changes that are not in it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--profiles", help="a folder with MODEL.json, or a name: cpu; else each model's own")
    parser.add_argument("--cells", type=int, default=8, help="of each model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of arrivals in a cell")
    parser.add_argument("--minutes", type=float, default=25.0, help="after which no run begins")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(None if given is None else list(given))
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 20)
    return args


def main() -> None:
    args, begun = arguments(), time.monotonic()
    asked = {"seed": args.seed, "commit": commit(), "models": args.models, "cells": args.cells,
             "seconds": args.seconds, "threads": args.threads}  # fmt: skip
    print(f"seed {args.seed}, commit {asked['commit']}")
    kept, subjects = Kept(args.json, asked), [Subject(model, args) for model in args.models]
    try:
        take_runs(subjects, kept, args.runs, begun + 60 * args.minutes)
        results = [report(subject, kept) for subject in subjects]
    finally:
        for subject in subjects:
            subject.llm.close()
    line = json.dumps({"bench": "predictions", **asked, "models": results})
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
