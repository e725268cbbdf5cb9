"""foretell against transformers on SmolLM2-135M-Instruct, CPU, one alternating run (A B A B …).

    python bench/compare_transformers.py [--rounds 3] [--float32] [--quick] [--only decode]

foretell runs as it comes (weights as shipped) and, for comparison, with its weights in bfloat16 as transformers
has them: the same dequantised values. All get the same prompts, greedy, end-of-sequence ignored, the same number of
threads, and a process of their own: two thread pools in one process slow each other down. Figures are medians;
other work on the machine moves them all, so only the ratios count, and samples taken while others were busy are
left out where there are better ones. Bars: decode 3 ×, prefill 1.1 ×, 16 concurrent 2 × transformers in bfloat16.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from child_engine import Engine, Sample

from foretell.benchmark.tables import number, table
from foretell.trace import Workload, named_workload

MODEL = "smollm2-135m"
BARS = {"decode": 3.0, "prefill": 1.1, "concurrent": 2.0}
NAMED = {"decode": "cpu-decode", "prefill": "cpu-prefill-1024", "concurrent": "cpu-16"}
UNITS = {"decode": "tok/s, batch 1", "prefill": "tok/s, 1024 tokens", "concurrent": "output tok/s, 16 requests"}
TEXT = Path(__file__).resolve().parent.parent / "LICENSE"
TEXT_TOKENS = 256
QUIET = 0.05  # share of the machine that others may use while a sample is taken


# -- what runs in a process of its own --------------------------------------------------------------------


class Foretell:
    def __init__(self, threads: int, dtype: str) -> None:
        from foretell import LLM

        self.llm = LLM(MODEL, num_threads=threads, dtype=dtype, enable_prefix_caching=False, max_model_len=2048)

    def about(self, again: bool = False) -> dict[str, Any]:
        from foretell.benchmark.setup import subject_of

        assembly = self.llm.assembly
        hardware = str(subject_of(self.llm, again=again).hardware)
        return {
            "kernels": assembly.kernels,
            "weights": assembly.weight_format,
            "vocab_size": self.llm.spec.vocab_size,
            "hardware": hardware,
        }

    def floor_seconds(self, workload: Workload, limit: int | None) -> float:
        from foretell.benchmark.setup import subject_of

        return subject_of(self.llm).floor(workload, max_output_tokens=limit).seconds

    def run(self, workload: Workload, limit: int | None) -> None:
        from foretell.benchmark.setup import greedy_params, prompts_of

        prompts = prompts_of(workload, self.llm.spec.vocab_size)
        self.llm.generate(prompts, greedy_params(workload, limit), progress=False)

    def token_ids(self) -> list[int]:
        """Of a short real text."""
        assert self.llm.tokenizer is not None
        text = TEXT.read_text(encoding="utf-8")
        return list(self.llm.tokenizer.encode(text, add_special_tokens=False)[:TEXT_TOKENS])

    def logprobs(self, ids: list[int]) -> list[float]:
        from foretell import SamplingParams

        (output,) = self.llm.generate(ids, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
        return [position.logprob for position in output.prompt_logprobs or () if position is not None]


class Transformers:
    def __init__(self, threads: int, dtype: str) -> None:
        import torch
        from transformers_model import reference_model

        from foretell.store import resolve

        torch.set_num_threads(threads)
        self.model = reference_model(resolve(MODEL).path).to(getattr(torch, dtype))

    def run(self, workload: Workload, limit: int | None) -> None:
        """All prompts in one batch, padded on the left, as its users do."""
        import torch

        longest = max(r.prompt_len for r in workload.requests)
        prompts = [list(r.prompt_token_ids or ()) for r in workload.requests]
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        count = limit or workload.requests[0].output_len
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    def logprobs(self, ids: list[int]) -> list[float]:
        import torch

        with torch.inference_mode():
            logits = self.model(torch.tensor([ids])).logits[0, :-1].float()
        picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])
        return [float(value) for value in picked[:, 0]]


# -- the run ----------------------------------------------------------------------------------------------

Samples = dict[str, dict[str, list[Sample]]]  # by engine, by what was run


def workloads(vocab_size: int, only: list[str] | None, quick: bool) -> dict[str, Workload]:
    found = {kind: named_workload(NAMED[kind], vocab_size) for kind in only or NAMED}
    return {kind: short(workload) for kind, workload in found.items()} if quick else found


def short(workload: Workload) -> Workload:
    requests = tuple(replace(r, output_len=min(24, r.output_len)) for r in workload.requests)
    return replace(workload, requests=requests)


def measure(engines: list[Engine], asked: dict[str, Workload], rounds: int) -> Samples:
    """Every round runs every engine once on everything, in turn, after one short run each."""
    runs: dict[str, tuple[Workload, int | None]] = {kind: (workload, None) for kind, workload in asked.items()}
    if "decode" in asked:
        runs["first"] = (asked["decode"], 1)
    for engine in engines:
        for workload, _ in runs.values():
            engine.sample(workload, 2)
    samples: Samples = {engine.name: {kind: [] for kind in runs} for engine in engines}
    for number_ in range(rounds):
        for kind, (workload, limit) in runs.items():
            for engine in engines if number_ % 2 == 0 else engines[::-1]:
                samples[engine.name][kind].append(engine.sample(workload, limit))
    return samples


def typical_seconds(samples: list[Sample]) -> float:
    """The median of the samples taken while the machine was ours, or of all if it never was."""
    quiet = [sample.seconds for sample in samples if sample.others < QUIET]
    return statistics.median(quiet or [sample.seconds for sample in samples])


def speeds(asked: dict[str, Workload], seconds: dict[str, float]) -> dict[str, float]:
    """tok/s from seconds; decode without its prefill: (whole - first token) ÷ (tokens - 1)."""
    found = {}
    if "decode" in asked:
        found["decode"] = (asked["decode"].output_tokens - 1) / (seconds["decode"] - seconds["first"])
    if "prefill" in asked:
        found["prefill"] = asked["prefill"].prompt_tokens / seconds["prefill"]
    if "concurrent" in asked:
        found["concurrent"] = asked["concurrent"].output_tokens / seconds["concurrent"]
    return found


def floor_speeds(engine: Engine, asked: dict[str, Workload]) -> dict[str, float]:
    seconds = {kind: engine.call("floor_seconds", workload, None) for kind, workload in asked.items()}
    if "decode" in asked:
        seconds["first"] = engine.call("floor_seconds", asked["decode"], 1)
    return speeds(asked, seconds)


def accuracy(engines: list[Engine], truth: Engine) -> dict[str, float]:
    """Mean |Δ log-probability| per token of a real text, against transformers in float32."""
    ids = engines[0].call("token_ids")
    exact = truth.call("logprobs", ids)
    return {
        engine.name: statistics.mean(abs(a - b) for a, b in zip(engine.call("logprobs", ids), exact, strict=True))
        for engine in engines
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="3 unless told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="transformers in float32 as a third engine")
    parser.add_argument("--quick", action="store_true", help="24 output tokens at most, one round unless told")
    parser.add_argument("--only", action="append", choices=list(BARS), help="leave the others out; may be repeated")
    args = parser.parse_args()
    with ExitStack() as stack:
        own = stack.enter_context(Engine("foretell", Foretell, args.threads, "auto"))
        about = own.call("about")
        asked = workloads(about["vocab_size"], args.only, args.quick)
        print(f"machine: {about['hardware']}; kernels: {about['kernels']}; foretell's weights: {about['weights']}")
        best = floor_speeds(own, asked)
        print(
            "floor (bytes or operations, the larger): " + ", ".join(f"{k} {number(v)} tok/s" for k, v in best.items())
        )
        engines = [own, stack.enter_context(Engine("foretell bfloat16", Foretell, args.threads, "bfloat16"))]
        engines.append(stack.enter_context(Engine("transformers bfloat16", Transformers, args.threads, "bfloat16")))
        exact = stack.enter_context(Engine("transformers float32", Transformers, args.threads, "float32"))
        errors = accuracy(engines, exact)
        engines += [exact] if args.float32 else []
        raw = measure(engines, asked, args.rounds or (1 if args.quick else 3))
        about, best = own.call("about", True), floor_speeds(own, asked)  # the machine may have been busy before
    report(asked, best, raw, errors, {**vars(args), **about})


def report(
    asked: dict[str, Workload],
    best: dict[str, float],
    raw: Samples,
    errors: dict[str, float],
    context: dict[str, Any],
) -> None:
    measured = {
        name: speeds(asked, {kind: typical_seconds(samples) for kind, samples in own.items()})
        for name, own in raw.items()
    }
    own, peer = measured["foretell"], measured["transformers bfloat16"]
    ratios = {kind: own[kind] / peer[kind] for kind in asked}
    met = {kind: ratios[kind] >= BARS[kind] for kind in asked}
    rows = []
    for kind in asked:
        figures = (number(best[kind]), *(number(figure[kind]) for figure in measured.values()))
        rows.append((UNITS[kind], *figures, f"{ratios[kind]:.2f}", f"{BARS[kind]:g}", "yes" if met[kind] else "NO"))
    print(table(("", "floor", *measured, "ratio", "bar", "met"), rows))
    print("mean |Δ logprob| against float32:", ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    shares = [sample.others for engine in raw.values() for samples in engine.values() for sample in samples]
    quiet = {name: {k: sum(s.others < QUIET for s in v) for k, v in engine.items()} for name, engine in raw.items()}
    print(f"other processes used {100 * statistics.median(shares):.0f} % of the machine; quiet samples: {quiet}")
    result = {
        "bench": "compare_transformers",
        **context,
        "floor": best,
        "tokens_per_second": measured,
        "ratios": ratios,
        "bars_met": met,
        "mean_abs_logprob_error": errors,
        "others_share_median": statistics.median(shares),
        "quiet_samples": quiet,
        "seconds": {name: {k: [s.seconds for s in v] for k, v in engine.items()} for name, engine in raw.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
