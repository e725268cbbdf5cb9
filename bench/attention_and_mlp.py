"""Attention's time is a line over the KV length, everything else's is flat: measured, and as the profile says.

    python bench/attention_and_mlp.py [MODEL] [--profile FILE] [--sequences 4] [--plot FILE.svg]

A decode step of so many sequences, each with a KV cache of 64 … 8192 tokens, in turn with the same step whose
attention is left out (it mixes nothing and gives zeros): the difference is attention, the rest sees each token alone.
The prediction comes first; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from foretell import LLM
from foretell.benchmark.tables import table
from foretell.cost.machine import kv_bytes_to_measure
from foretell.cost.named import open_profile
from foretell.cost.step import StepCost
from foretell.cost.stepping import StepBench, decodes
from foretell.loadgen.plot import BLUE, MARGIN, ORANGE, STYLE, WIDTH, Panel

KEYS = (64, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
Row = tuple[int, float, float, float, float]  # keys; seconds of attention, of the rest: foretold, measured


class WithoutAttention:
    """The kernels, but attention gives zeros at once."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def attend(self, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.zeros(len(q), q.shape[1] * q.shape[2], dtype=q.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)


def measure(llm: LLM, sequences: int) -> dict[int, tuple[float, float]]:
    """By KV length: (seconds of the whole step, seconds without attention), medians of runs in turn."""
    bench = StepBench(llm)
    found: dict[int, tuple[float, float]] = {}
    attentions = [block.attention for block in bench.runner.model.blocks]
    whole = [attention.kernels for attention in attentions]

    def seconds(shape: Any, *, without: bool) -> float | None:
        for attention, kernels in zip(attentions, whole, strict=True):
            attention.kernels = WithoutAttention(kernels) if without else kernels
        return bench.seconds(shape)

    def run(engine: object) -> None:
        bench.fill_cache()
        for keys in KEYS:
            shape = decodes(sequences, keys)
            pairs = [(seconds(shape, without=False), seconds(shape, without=True)) for _ in range(3)]
            if None not in pairs[0]:
                found[keys] = tuple(sorted(values)[1] for values in zip(*pairs, strict=True))  # type: ignore[assignment]

    llm.service.call(run).result()
    return found


def picture(rows: list[Row], title: str) -> str:
    width = WIDTH / 2 - 1.5 * MARGIN
    right = 1.05 * max(row[0] for row in rows)
    top = 1.1e3 * max(max(row[1:]) for row in rows)
    panels = []
    for index, (name, said, seen) in enumerate((("attention", 1, 2), ("linear layers, norms, head", 3, 4))):
        left = MARGIN + index * (width + MARGIN)
        panel = Panel(f"{name}, ms", "KV length, tokens", left, 70, width, 220, right, top)
        panel.line([(row[0], 1e3 * row[said]) for row in rows], ORANGE)
        panel.dots([(row[0], 1e3 * row[seen]) for row in rows], BLUE, 4)
        panels.append(panel.svg())
    body = "\n".join(panels)
    words = "line: foretold by the profile; dots: measured"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 330" width="{WIDTH}" height="330">\n'
        f'<style>{STYLE}</style>\n<text x="{MARGIN}" y="24" font-size="15" font-weight="600">{title}</text>\n'
        f'<text class="small" x="{MARGIN}" y="42">{words}</text>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--profile", help="a file or a name; else the model's own calibration")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    options: dict[str, Any] = {"enable_prefix_caching": False, "device": "cpu", "num_threads": args.threads}
    with LLM(args.model, kv_cache_bytes=kv_bytes_to_measure("cpu"), **options) as llm:
        profile = open_profile(args.profile, llm.spec, model=llm.assembly.files.name)
        cost = StepCost(profile)
        said = {keys: cost.estimate(decodes(args.sequences, keys)) for keys in KEYS}
        measured = measure(llm, args.sequences)
    rows: list[Row] = [
        (keys, said[keys].attention, whole - rest, said[keys].linear + said[keys].head, rest)
        for keys, (whole, rest) in measured.items()
    ]
    header = ("KV length", "attention, ms: foretold", "measured", "the rest, ms: foretold", "measured")
    print(table(header, [(str(row[0]), *(f"{1e3 * value:.2f}" for value in row[1:])) for row in rows]))
    if args.plot:
        args.plot.write_text(picture(rows, f"{profile.model}: a decode step of {args.sequences} sequences"))
    names = ("keys", "attention_foretold", "attention", "rest_foretold", "rest")
    figures = [dict(zip(names, row, strict=True)) for row in rows]
    found = {"bench": "attention_and_mlp", "model": args.model, "sequences": args.sequences, "rows": figures}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
