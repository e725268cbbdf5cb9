"""What fewer bits cost a real model: perplexity and KL divergence against bfloat16, on real text.

    python bench/gpu/quality.py [--model smollm2-135m] [--text FILE] [--windows 8] [--length 1024] [--json FILE]

The text (Python's own documentation if none is given) is cut into windows, each a prompt of its own. Every position's
whole distribution is recorded where the engine computes it. "few": 32 tokens a step, so that the kernels of decode
steps and the cache do the work; "many": whole windows, as prompts are read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))

from divergence import divergence, windows_of

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "fp8, fp8 cache": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
STEPS = {"few": 32, "many": 8192}  # tokens of a step
PARAMS = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=1, detokenize=False)


class Recorder:
    """In the head's place: what it returns for many rows is kept, as log-probabilities."""

    def __init__(self, head: Any) -> None:
        self.head, self.kept = head, []

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(hidden, out)
        if out is None:  # asked for the prompt's log-probabilities, not for a token
            self.kept.append(torch.log_softmax(logits.float(), dim=-1))
        return logits


def distributions(model: str, windows: list[list[int]], step: str, options: dict[str, Any]) -> tuple[Tensor, int]:
    """Log-probabilities [windows · (length - 1), vocab] of what follows each token, and the bytes of weights."""
    length = len(windows[0])
    with LLM(
        model, device="cuda", max_num_seqs=1, max_num_batched_tokens=STEPS[step], max_model_len=length + 16,
        kv_cache_bytes=1 << 30, enable_prefix_caching=False, **{"dtype": "bfloat16", **options},
    ) as llm:  # fmt: skip
        runner: Any = llm.assembly.engine.executor.runner  # type: ignore[attr-defined]
        recorder = runner.model.head = Recorder(runner.model.head)
        for window in windows:
            done = llm.generate(window, PARAMS, progress=False)[0].outputs[0]
            assert done.error is None, done.error
        found = torch.cat(recorder.kept)
        assert len(found) == len(windows) * (length - 1), found.shape
        return found, llm.assembly.weight_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--kinds", default=";".join(KINDS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    windows = windows_of(arguments.model, arguments.text, arguments.windows, arguments.length)
    rows: list[dict[str, Any]] = []
    base: Tensor | None = None
    for step in STEPS:
        for kind in arguments.kinds.split(";"):
            if step == "many" and kind not in ("bfloat16", "fp8"):
                continue  # the same codes; and whole windows attend to what was just made, not to the cache
            started = time.perf_counter()
            found, weight_bytes = distributions(arguments.model, windows, step, KINDS[kind])
            base = found if kind == "bfloat16" else base
            assert base is not None, "bfloat16 comes first"
            against, seconds = divergence(base, found, windows), time.perf_counter() - started
            own = {"kind": kind, "step": step, "weight_bytes": weight_bytes, "seconds": seconds}
            rows.append(own | asdict(against))
            print(f"{kind:16s} {step:5s} {against}  {weight_bytes / 1e6:6.0f} MB", flush=True)
    result = {
        "bench": "gpu-quality", "model": arguments.model, "text": str(arguments.text or "pydoc_data.topics"),
        "windows": arguments.windows, "length": arguments.length, "card": torch.cuda.get_device_name(),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "rows": len(rows)}))


if __name__ == "__main__":
    main()
