"""Options of the benchmark commands alone; those of the engine are in ``options``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_WHAT, _WHEN, _HOW, _ENGINE = "What is asked", "When it is asked", "How it is measured", "Engine"

Model = Annotated[str, typer.Argument(help="Alias, folder, .gguf file or repository id.")]
Workload = Annotated[
    str | None,
    typer.Option("--workload", help="A named workload; an unknown name lists them.", rich_help_panel=_WHAT),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Trace file: Azure csv, Mooncake jsonl, ShareGPT json.", rich_help_panel=_WHAT),
]
TraceFormat = Annotated[
    Literal["auto", "azure", "mooncake", "sharegpt"],
    typer.Option("--trace-format", help="Of the trace; auto looks inside.", rich_help_panel=_WHAT),
]
InputLen = Annotated[
    str, typer.Option(help="Prompt tokens: 128, a range 64-256, or mean~deviation 200~50.", rich_help_panel=_WHAT)
]
OutputLen = Annotated[str, typer.Option(help="Output tokens, written the same way.", rich_help_panel=_WHAT)]
NumRequests = Annotated[
    int | None,
    typer.Option(min=1, max=1_000_000, help="Requests to send; of a trace, the first.", rich_help_panel=_WHAT),
]
MaxInput = Annotated[
    int | None, typer.Option("--max-input-len", min=1, help="Cut longer prompts.", rich_help_panel=_WHAT)
]
MaxOutput = Annotated[
    int | None, typer.Option("--max-output-len", min=1, help="Cut longer outputs.", rich_help_panel=_WHAT)
]
Seed = Annotated[int, typer.Option("--seed", help="Of lengths, arrivals and dummy weights.", rich_help_panel=_WHAT)]

Rate = Annotated[
    float | None,
    typer.Option(help="Requests per second; 1 unless a trace has times of its own.", rich_help_panel=_WHEN),
]
Burstiness = Annotated[float, typer.Option(help="1: Poisson; below: bursts; above: steadier.", rich_help_panel=_WHEN)]
TimeScale = Annotated[
    float, typer.Option(min=0, help="Multiplies a trace's gaps: 0.5 is twice as fast.", rich_help_panel=_WHEN)
]
Duration = Annotated[float | None, typer.Option(min=0.001, help="Send for so many seconds.", rich_help_panel=_WHEN)]

Repeat = Annotated[int, typer.Option(min=1, help="Measured runs.", rich_help_panel=_HOW)]
WarmupRuns = Annotated[
    int, typer.Option("--warmup", min=0, help="Runs before that do not count.", rich_help_panel=_HOW)
]
Warmup = Annotated[
    bool, typer.Option("--warmup/--no-warmup", help="A few requests first that do not count.", rich_help_panel=_HOW)
]
ComparePolicies = Annotated[
    bool,
    typer.Option("--compare-policies", help="All three policies in turn, same arrivals.", rich_help_panel=_HOW),
]
Virtual = Annotated[
    bool,
    typer.Option("--virtual", help="In virtual time, each step at its floor: no weights.", rich_help_panel=_HOW),
]
SloTTFT = Annotated[
    float | None, typer.Option("--slo-ttft-ms", min=0, help="Objective for TTFT.", rich_help_panel=_HOW)
]
SloTPOT = Annotated[
    float | None, typer.Option("--slo-tpot-ms", min=0, help="Objective for TPOT.", rich_help_panel=_HOW)
]
SloE2E = Annotated[float | None, typer.Option("--slo-e2e-ms", min=0, help="Objective for E2E.", rich_help_panel=_HOW)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the JSON line to this file.", rich_help_panel=_HOW)
]

Caching = Annotated[
    bool | None,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        help="Share KV blocks of equal prompt beginnings; by default for traces only.",
        rich_help_panel=_ENGINE,
    ),
]
ChunkTokens = Annotated[
    int,
    typer.Option(
        "--max-chunk-tokens",
        min=0,
        help="Most prompt tokens of one request in a step; 0: no cap.",
        rich_help_panel=_ENGINE,
    ),
]
BlockSize = Annotated[int, typer.Option(min=1, help="Tokens in a KV block.", rich_help_panel=_ENGINE)]
