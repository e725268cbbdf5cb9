"""foretell against transformers on SmolLM2-135M-Instruct, CPU, one alternating run (A B A B …).

    python bench/compare_transformers.py [--rounds 3] [--float32] [--quick]

Both get the same weights in bfloat16, the same prompts, greedy, end-of-sequence ignored, the same threads.
Figures are medians; other work on the machine moves them all, so only the ratios count. Bars: decode 3 ×,
prefill 1.1 ×, 16 concurrent 2 × transformers in bfloat16. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foretell import LLM, SamplingParams
from foretell.benchmark.setup import greedy_params, prompts_of, subject_of
from foretell.benchmark.tables import number, table
from foretell.trace import Workload, named_workload

BARS = {"decode": 3.0, "prefill": 1.1, "concurrent": 2.0}
UNITS = {"decode": "tok/s, batch 1", "prefill": "tok/s, 1024 tokens", "concurrent": "output tok/s, 16 requests"}
TEXT = Path(__file__).resolve().parent.parent / "LICENSE"
TEXT_TOKENS = 256


# -- transformers -----------------------------------------------------------------------------------------


def reference_model(gguf_file: Path) -> Any:
    """The file's weights, dequantised, in transformers' own Llama; float32."""
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(str(gguf_file))

    def value(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = LlamaConfig(
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        max_position_embeddings=value("context_length"),
        vocab_size=value("vocab_size"),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = half_rotated(weight, heads[part])
        weights[reference_name(tensor.name)] = weight
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def half_rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF keeps rotated pairs side by side (2i, 2i+1); transformers keeps them half a head apart."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def reference_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


@torch.inference_mode()
def run_reference(model: Any, workload: Workload, limit: int | None) -> None:
    """All prompts in one batch, padded on the left, as its users do."""
    longest = max(r.prompt_len for r in workload.requests)
    prompts = [list(r.prompt_token_ids or ()) for r in workload.requests]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    count = limit or workload.requests[0].output_len
    model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False)


@torch.inference_mode()
def reference_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# -- the run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    name: str
    run: Callable[[Workload, int | None], None]  # limit: output tokens

    def seconds(self, workload: Workload, limit: int | None = None) -> float:
        started = time.perf_counter()
        self.run(workload, limit)
        return time.perf_counter() - started


def foretell_engine(llm: LLM) -> Engine:
    def run(workload: Workload, limit: int | None) -> None:
        llm.generate(prompts_of(workload, llm.spec.vocab_size), greedy_params(workload, limit), progress=False)

    return Engine("foretell bfloat16", run)


def workloads(vocab_size: int, quick: bool) -> dict[str, Workload]:
    named = {"decode": "cpu-decode", "prefill": "cpu-prefill-1024", "concurrent": "cpu-16"}
    found = {kind: named_workload(name, vocab_size) for kind, name in named.items()}
    if quick:
        found = {kind: short(workload) for kind, workload in found.items()}
    return found


def short(workload: Workload) -> Workload:
    return replace(workload, requests=tuple(replace(r, output_len=min(24, r.output_len)) for r in workload.requests))


def measure(engines: list[Engine], asked: dict[str, Workload], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by engine and what was run; every round runs every engine once on everything, in turn."""
    for engine in engines:
        engine.run(short(asked["decode"]), 4)
        engine.run(asked["prefill"], None)
        engine.run(asked["concurrent"], 2)
    seconds: dict[str, dict[str, list[float]]] = {e.name: {kind: [] for kind in (*asked, "first")} for e in engines}
    for number_ in range(rounds):
        for kind, limit in (("first", 1), ("decode", None), ("prefill", None), ("concurrent", None)):
            for engine in engines if number_ % 2 == 0 else engines[::-1]:
                workload = asked["decode" if kind == "first" else kind]
                seconds[engine.name][kind].append(engine.seconds(workload, limit))
    return seconds


def speeds(asked: dict[str, Workload], seconds: dict[str, float]) -> dict[str, float]:
    """tok/s from seconds; decode without its prefill: (whole - first token) ÷ (tokens - 1)."""
    tokens = asked["decode"].output_tokens - 1
    return {
        "decode": tokens / (seconds["decode"] - seconds["first"]),
        "prefill": asked["prefill"].prompt_tokens / seconds["prefill"],
        "concurrent": asked["concurrent"].output_tokens / seconds["concurrent"],
    }


def floor_speeds(llm: LLM, asked: dict[str, Workload]) -> dict[str, float]:
    subject = subject_of(llm)
    print(f"machine: {subject.hardware}; kernels: {llm.assembly.kernels}; floor: bytes or operations, the larger")
    seconds = {kind: subject.floor(workload).seconds for kind, workload in asked.items()}
    seconds["first"] = subject.floor(asked["decode"], max_output_tokens=1).seconds
    return speeds(asked, seconds)


def accuracy(llm: LLM, exact: Any, rounded: Any) -> dict[str, float]:
    """Mean |Δ log-probability| per token of a real text, against transformers in float32."""
    if llm.tokenizer is None:
        raise SystemExit("the model has no tokenizer")
    ids = llm.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)[:TEXT_TOKENS]
    (output,) = llm.generate(ids, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    own = torch.tensor([position.logprob for position in output.prompt_logprobs or () if position is not None])
    truth = reference_logprobs(exact, ids)
    return {
        "foretell bfloat16": float((own - truth).abs().mean()),
        "transformers bfloat16": float((reference_logprobs(rounded, ids) - truth).abs().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="transformers in float32 as a third engine")
    parser.add_argument("--quick", action="store_true", help="one round of 24 output tokens")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"dtype": "bfloat16", "enable_prefix_caching": False, "max_model_len": 2048}
    with LLM("smollm2-135m", num_threads=args.threads, **options) as llm:
        asked = workloads(llm.spec.vocab_size, args.quick)
        best = floor_speeds(llm, asked)
        exact = reference_model(llm.assembly.files.path)
        rounded = reference_model(llm.assembly.files.path).to(torch.bfloat16)
        errors = accuracy(llm, exact, rounded)
        engines = [
            foretell_engine(llm),
            Engine("transformers bfloat16", lambda w, limit: run_reference(rounded, w, limit)),
        ]
        if args.float32:
            engines.append(Engine("transformers float32", lambda w, limit: run_reference(exact, w, limit)))
        raw = measure(engines, asked, 1 if args.quick else args.rounds)
        kernels = llm.assembly.kernels
    report(asked, best, raw, errors, kernels, vars(args))


def report(
    asked: dict[str, Workload],
    best: dict[str, float],
    raw: dict[str, dict[str, list[float]]],
    errors: dict[str, float],
    kernels: str,
    arguments: dict[str, Any],
) -> None:
    measured = {
        name: speeds(asked, {kind: statistics.median(times) for kind, times in own.items()})
        for name, own in raw.items()
    }
    own, peer = measured["foretell bfloat16"], measured["transformers bfloat16"]
    ratios = {kind: own[kind] / peer[kind] for kind in BARS}
    rows = [
        (UNITS[kind], number(best[kind]), *(number(m[kind]) for m in measured.values()), f"{ratios[kind]:.2f}",
         f"{bar:g}", "yes" if ratios[kind] >= bar else "NO")
        for kind, bar in BARS.items()
    ]  # fmt: skip
    print(table(("", "floor", *measured, "ratio", "bar", "met"), rows))
    print("mean |Δ logprob| against float32:", ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
    result = {
        "bench": "compare_transformers",
        "kernels": kernels,
        **arguments,
        "floor": best,
        "tokens_per_second": measured,
        "ratios": ratios,
        "bars_met": {kind: ratios[kind] >= bar for kind, bar in BARS.items()},
        "mean_abs_logprob_error": errors,
        "seconds": raw,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
