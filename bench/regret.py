"""What following the planner costs, and gains: its choice beside other configurations, all of them really run.

    python bench/regret.py [--models NAME …] [--cases 12] [--seconds 12] [--seed 6] [--state FILE] [--json FILE]

A case is a model, a kind of traffic and limits on latencies. The planner chooses for traffic of the case's kind, and
then other requests of that kind, the same for everybody, are served by: its choice and its runner-up, the defaults of
other engines, and legal configurations drawn from a seed. The best two (and the planner's choice) are run three times
more, in turn, and their medians compared. Regret bar: the choice reaches 97 % of the best goodput.

Theory first: rates come from what the simulator says is possible, limits from one request alone. Every run is kept in
``--state``, and a run that is there is not done again: an interrupted bench goes on where it was. A model needs its
calibration (foretell calibrate), made when the machine was as quiet as it is now. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foretell.async_llm import AsyncLLM
from foretell.benchmark.online import run_open_loop
from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.config import PolicyName
from foretell.core.params import SamplingParams
from foretell.cost.rates import rates_foretold
from foretell.cost.step import StepCost
from foretell.cpus import usable_cpus
from foretell.errors import ForetellError
from foretell.executor.virtual import VirtualExecutor
from foretell.plan.command import PlanAsked, build_workload, engine_dtype, make_problem
from foretell.plan.fleet import serve
from foretell.plan.memory import Ledger, ledger
from foretell.plan.plan import conclude, engine_options
from foretell.plan.problem import Problem
from foretell.plan.prune import illegal
from foretell.plan.search import search
from foretell.plan.space import Candidate, Choices, candidates
from foretell.trace.metrics import summarize

BAR = 0.97
TRAFFIC = {  # prompt and output lengths: short, so that a run of some seconds has many requests
    "chat": ("16-96", "8-32"),
    "summarise": ("128-384", "4-12"),
    "write": ("8-24", "32-64"),
}
SITUATIONS = {  # load, of what the simulator says is possible; limits, in multiples of one request alone
    "light, tight": (0.5, 3.0, 2.0),
    "heavy, tight": (0.9, 6.0, 3.0),
    "heavy, loose": (0.95, 15.0, 6.0),
}
PEERS: dict[
    str, tuple[PolicyName, int, int]
] = {  # policy, sequences, tokens a step: what each starts with unless told otherwise
    "as vLLM": ("mixed", 256, 2048),
    "as llama.cpp": ("mixed", 4, 2048),
    "as nano-vllm": ("prefill-first", 512, 16384),
}
LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1))
KV_SHARE = 0.1  # of free memory: short runs need no more
RERUNS = 3


@dataclass(frozen=True)
class Case:
    model: str
    traffic: str
    situation: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}, {self.traffic}, {self.situation}"


def draw_cases(models: list[str], count: int, seed: int) -> list[Case]:
    """The models in turn, so that a few cases have some of each."""
    rng = random.Random(seed)
    kinds = {model: [(t, s) for t in TRAFFIC for s in SITUATIONS] for model in models}
    for kind in kinds.values():
        rng.shuffle(kind)
    every = [(model, *kinds[model][i]) for i in range(len(TRAFFIC) * len(SITUATIONS)) for model in models]
    return [Case(*chosen, seed=rng.randrange(1 << 20)) for chosen in every[:count]]


def ask(case: Case, args: argparse.Namespace) -> PlanAsked:
    """The planner's question, its rate and limits from theory."""
    prompts, outputs = TRAFFIC[case.traffic]
    load, slow_start, slow_token = SITUATIONS[case.situation]
    traffic = Traffic(prompt_lengths=prompts, output_lengths=outputs, num_requests=96, seed=case.seed)
    profiles = (str(args.profiles / f"{case.model}.json"),) if args.profiles else ()
    asked = PlanAsked(case.model, traffic, Arrivals(rate=1e4), None, "cpu", profiles=profiles)
    problem = make_problem(asked)
    plain = Candidate(next(iter(problem.profiles)), 1, 1, 1, "mixed", 32, 2048, 0, KV_SHARE, True)
    held = ledger(problem, plain)
    if isinstance(held, str):
        raise SystemExit(held)
    step = StepCost(problem.profiles[plain.weights])
    run = serve(problem.prompts, problem.config(plain), problem.windows, [VirtualExecutor(step, held.num_blocks)])
    rate = load * len(run.requests) / run.seconds
    alone = rates_foretold(step.profile, problem.config(plain))
    requests = problem.prompts.workload.requests
    prompt = sum(r.prompt_len for r in requests) / len(requests) / alone["prompt_tokens_per_second"]
    ttft, tpot = slow_start * (prompt + alone["tpot_alone_seconds"]), slow_token * alone["tpot_alone_seconds"]
    slo = f"ttft_p90={1e3 * ttft:.0f}ms,tpot_p90={1e3 * tpot:.0f}ms"
    count = max(8, round(rate * args.seconds))
    return replace(asked, traffic=replace(traffic, num_requests=count), arrivals=Arrivals(rate=rate), slo=slo)


def choose(problem: Problem, case: Case, count: int) -> dict[str, Candidate]:
    """By name: the planner's two, the peers' defaults, and random ones until there are ``count``."""
    weights = next(iter(problem.profiles))
    space = candidates(Choices((weights,), LAYOUTS, kv_shares=(KV_SHARE,), prefix_caching=(True,)))
    found = search(problem, space, processes=usable_cpus())
    plan = conclude(problem, found, model=case.model)
    if plan.winner is None:
        raise SystemExit(f"{case}: nothing can be run")
    chosen = {"planner": found.candidates[plan.winner]}
    others = [i for i in plan.order[1:] if found.outcomes[i] != found.outcomes[plan.winner]]
    if others:
        chosen["runner-up"] = found.candidates[others[0]]
    for name, (policy, seqs, tokens) in PEERS.items():
        peer = replace(chosen["planner"], tp=1, pp=1, policy=policy, max_num_seqs=seqs, max_num_batched_tokens=tokens)
        chosen[name] = replace(peer, max_chunk_tokens=0)
    rng = random.Random(case.seed)
    rng.shuffle(space)
    legal = (c for c in space if not illegal(problem, c) and isinstance(ledger(problem, c), Ledger))
    for candidate in legal:
        if len(chosen) >= count:
            break
        if candidate not in chosen.values():
            chosen[f"random {len(chosen)}"] = candidate
    return chosen


def run(problem: Problem, asked: PlanAsked, candidate: Candidate) -> dict[str, Any]:
    """Goodput and latencies of serving the case's other requests so; ``error`` where it could not be."""
    held = ledger(problem, candidate)
    if isinstance(held, str):
        return {"goodput": 0.0, "error": held}
    options = engine_options(problem, candidate, held.kv_cache_bytes, engine_dtype(candidate.weights))
    workload = build_workload(
        replace(asked, traffic=replace(asked.traffic, seed=asked.traffic.seed + 1)), problem.spec.vocab_size
    )
    try:
        llm = AsyncLLM(asked.model, **{name: value for name, value in options.items() if value is not None})
        try:
            warm = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            llm.llm.generate([list(range(5, 69)), list(range(9, 40))], warm, progress=False)
            report = summarize(run_open_loop(llm, workload).requests, problem.goal.objectives)
        finally:
            llm.close()
    except ForetellError as error:
        return {"goodput": 0.0, "error": str(error)}
    return {
        "goodput": report.goodput_per_second, "good_share": report.good_share,
        "ttft_p90": report.ttft_seconds.p90, "tpot_p90": report.tpot_seconds.p90, "failed": report.failed,
    }  # fmt: skip


class State:
    """Runs by (case, candidate, round), one line of a file each: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, dict(self._read(path))

    @staticmethod
    def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            entry = json.loads(line)
            yield entry["key"], entry["value"]

    def get(self, key: str, make: Any) -> dict[str, Any]:
        if key not in self.runs:
            self.runs[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": self.runs[key]}) + "\n")
        return self.runs[key]


def do_case(case: Case, args: argparse.Namespace, state: State) -> dict[str, Any]:
    key = f"{case}, seed {case.seed}, {args.seconds:g} s, {args.candidates} candidates"
    asked = PlanAsked.from_dict(state.get(f"{key}: ask", lambda: ask(case, args).as_dict()))
    problem = make_problem(asked)
    told = state.get(
        f"{key}: chosen",
        lambda: {name: asdict(c) for name, c in choose(problem, case, args.candidates).items()},
    )
    chosen = {name: Candidate(**fields) for name, fields in told.items()}
    print(f"\n{case}: {asked.arrivals.rate:.2f} requests/s × {asked.traffic.num_requests}, {asked.slo}", flush=True)

    def goodput(name: str, round_: int) -> float:
        before = time.perf_counter()
        found = state.get(f"{key}: {name} #{round_}", lambda: run(problem, asked, chosen[name]))
        took = time.perf_counter() - before
        print(f"  {name:14} goodput {found['goodput']:.3f}/s  {found.get('error') or ''} [{took:.0f} s]", flush=True)
        return float(found["goodput"])

    first = {name: goodput(name, 0) for name in chosen}
    finals = sorted({*sorted(first, key=lambda name: -first[name])[:2], "planner"})
    again: dict[str, list[float]] = {name: [] for name in finals}
    for number in range(RERUNS):
        for name in finals:
            again[name].append(goodput(name, number + 1))
    medians = {name: statistics.median(values) for name, values in again.items()}
    best = max(medians.values())
    reached = medians["planner"] / best if best else 1.0
    gains = {peer: first["planner"] / first[peer] if first[peer] else None for peer in PEERS}
    winner = max(medians, key=lambda name: medians[name])
    noise = max(
        (max(values) - min(values)) / medians[name] if medians[name] else 0.0 for name, values in again.items()
    )
    print(f"  → {100 * reached:.1f} % of the best ({winner}), where runs of one differ by up to {100 * noise:.0f} %")
    print(f"    planner: {chosen['planner']}", flush=True)
    return {"case": str(case), "rate": asked.arrivals.rate, "slo": asked.slo, "reached": reached, "noise": noise,
            "first": first, "again": again, "gains": gains,
            "candidates": {name: str(c) for name, c in chosen.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--profiles", type=Path, help="a folder with MODEL.json; else each model's own")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--candidates", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals in a run")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--state", type=Path, default=Path("bench/results/regret-runs.jsonl"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases, state = draw_cases(args.models, args.cases, args.seed), State(args.state)
    runs = args.candidates + 2.5 * RERUNS
    print(f"{len(cases)} cases of about {runs:.0f} runs; bar: {100 * BAR:.0f} % of the best goodput that was found")
    print(f"about {len(cases) * runs * (args.seconds * 1.3 + 4) / 60:.0f} minutes, without what is known already")
    results = [do_case(case, args, state) for case in cases]
    reached = [result["reached"] for result in results]
    held = sum(value >= BAR for value in reached)
    print(f"\nthe planner's choice reached {100 * min(reached):.1f} % of the best at least, median "
          f"{100 * statistics.median(reached):.1f} %; {held} of {len(results)} cases hold the bar")  # fmt: skip
    gains = {}
    for peer in PEERS:
        ratios = [result["gains"].get(peer) for result in results]
        known = [ratio for ratio in ratios if ratio is not None]
        if known:
            gains[peer] = {
                "median": statistics.median(known),
                "least": min(known),
                "without_any_goodput": len(ratios) - len(known),
            }
            of = gains[peer]
            print(f"goodput beside the defaults {peer}: × {of['median']:.2f} (median), × {of['least']:.2f} at least")
    line = json.dumps({"bench": "regret", "seed": args.seed, "seconds": args.seconds, "bar": BAR,
                       "reached": reached, "held": held, "gains": gains, "cases": results})  # fmt: skip
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
