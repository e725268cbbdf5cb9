"""What fewer bits cost a real model: perplexity and KL divergence against bfloat16, on real text, on a CPU.

    python bench/formats.py [--model smollm2-135m] [--text FILE] [--windows 6] [--length 1024] [--json FILE]

Every layer computes with exactly what its codes mean, in float32, so this is the cost of the formats themselves
(bench/gpu/quality.py has the GPU's kernels in it too). "fp8 rounded inputs" is how many rows are multiplied on a GPU:
inputs in e4m3 too, a scale for each token. The text is Python's own documentation if none is given.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from divergence import divergence, windows_of
from torch import Tensor

from foretell.kernels.base import BatchContext, KVGroupView, KVLayer, Linear
from foretell.kernels.cpu import CpuKernels
from foretell.kernels.formats import FORMATS
from foretell.model.load import load_model, spec_for
from foretell.model.transformer import Transformer
from foretell.store import resolve
from foretell.worker.kv import allocate

E4M3_LARGEST = 448.0
KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {}, "float32": {"dtype": torch.float32}, "int8": {"name": "int8"}, "int4": {"name": "int4"},
    "fp8": {"name": "fp8"}, "fp8 rounded inputs": {"name": "fp8", "inputs": True}, "fp8 cache": {"cache": True},
    "fp8 rounded inputs, fp8 cache": {"name": "fp8", "inputs": True, "cache": True},
}  # fmt: skip


class RoundedInputs:
    """A layer whose inputs are rounded to e4m3 with a scale for each row."""

    def __init__(self, linear: Linear) -> None:
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features
        self.nbytes = linear.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(dim=1, keepdim=True) / E4M3_LARGEST).clamp(min=1e-30)
        return self.linear((x / scale).to(torch.float8_e4m3fn).float() * scale)


class Meaning(CpuKernels):
    """Layers of what the codes mean; ``inputs``: rounded too; ``cache``: keys and values in e4m3."""

    def __init__(self, *, inputs: bool = False, cache: bool = False) -> None:
        super().__init__()
        self.inputs, self.cache = inputs, cache

    def quantise_linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear:
        kept_as = FORMATS[name]
        linear = self.pack_linear(kept_as.dequantise(kept_as.quantise(weight), weight.shape[1]), bias)
        return RoundedInputs(linear) if self.inputs else linear

    def write_kv(self, k: Tensor, v: Tensor, kv: KVLayer, context: BatchContext) -> None:
        if self.cache:
            k, v = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in (k, v))
        super().write_kv(k, v, kv, context)


@torch.inference_mode()
def distributions(model: Transformer, window: list[int], block_size: int = 16) -> Tensor:
    """Log-probabilities [length - 1, vocab] of what follows each token."""
    spec, length = model.spec, len(window)
    groups, blocks = len(spec.kv_groups), -(-length // block_size)
    kv = allocate(spec, (blocks,) * groups, block_size, torch.float32)
    view = KVGroupView(torch.arange(blocks, dtype=torch.int32)[None], torch.arange(length))
    starts, lens = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    context = BatchContext(torch.arange(length), starts, lens, (view,) * groups, block_size, length, length)
    hidden = model.forward(torch.tensor(window), context, kv)
    return torch.log_softmax(model.logits(hidden[:-1]), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = resolve(arguments.model)
    spec = spec_for(files)
    windows = windows_of(arguments.model, arguments.text, arguments.windows, arguments.length)
    rows: list[dict[str, Any]] = []
    base: Tensor | None = None
    for kind, how in KINDS.items():
        kernels = Meaning(inputs="inputs" in how, cache="cache" in how)
        model = load_model(files, spec, kernels, how.get("dtype", torch.bfloat16), quantization=how.get("name"))
        found = torch.cat([distributions(model, window) for window in windows])
        base = found if base is None else base
        against = divergence(base, found, windows)
        rows.append({"kind": kind, **asdict(against)})
        print(f"{kind:30s} {against}", flush=True)
    result = {
        "bench": "formats", "model": arguments.model, "text": str(arguments.text or "pydoc_data.topics"),
        "windows": arguments.windows, "length": arguments.length, "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "rows": rows,
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "rows": len(rows)}))


if __name__ == "__main__":
    main()
