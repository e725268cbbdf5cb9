"""Options of the benchmark commands alone; those of the engine are in ``options``. The groups at the end name their
fields as the dataclasses do that they become."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foretell.cli import options as o

if TYPE_CHECKING:
    from foretell.benchmark.traffic import Arrivals, Traffic
    from foretell.trace import Objectives

_WHAT, _WHEN, _HOW, _ENGINE = "What is asked", "When it is asked", "How it is measured", "Engine"

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
    str | None,
    typer.Option(
        "--input-len",
        help="Prompt tokens: 128 (if not given), a range 64-256, or mean~deviation 200~50.",
        rich_help_panel=_WHAT,
    ),
]
OutputLen = Annotated[
    str | None,
    typer.Option(
        "--output-len", help="Output tokens, written the same way; 128 if not given.", rich_help_panel=_WHAT
    ),
]
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
Burstiness = Annotated[
    float | None,
    typer.Option(
        help="Of the gaps: 1 Poisson (if not given), below bursts, above steadier, inf constant.",
        rich_help_panel=_WHEN,
    ),
]
ArrivalsKind = Annotated[
    Literal["poisson", "gamma", "constant"],
    typer.Option(
        "--arrivals",
        help="Gaps between requests: poisson, gamma (as bursty as --burstiness says), constant.",
        rich_help_panel=_WHEN,
    ),
]
TimeScale = Annotated[
    float, typer.Option(min=0, help="Multiplies a trace's gaps: 0.5 is twice as fast.", rich_help_panel=_WHEN)
]
Duration = Annotated[
    float | None, typer.Option("--duration", min=0.001, help="Send for so many seconds.", rich_help_panel=_WHEN)
]

Repeat = Annotated[int, typer.Option(min=1, help="Measured runs.", rich_help_panel=_HOW)]
WarmupRuns = Annotated[
    int, typer.Option("--warmup", min=0, help="Runs before that do not count.", rich_help_panel=_HOW)
]
WarmupRequests = Annotated[
    int, typer.Option("--warmup", min=0, help="Requests first that do not count.", rich_help_panel=_HOW)
]
ComparePolicies = Annotated[
    bool,
    typer.Option("--compare-policies", help="All three policies in turn, same arrivals.", rich_help_panel=_HOW),
]
Virtual = Annotated[
    bool,
    typer.Option("--virtual", help="In virtual time, each step at its floor: no weights.", rich_help_panel=_HOW),
]
Slo = Annotated[
    str | None,
    typer.Option(help="Objectives for goodput: ttft=500ms,tpot=50ms,e2e=10s (any of them).", rich_help_panel=_HOW),
]
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


@dataclass(frozen=True)
class TrafficGroup:
    """What is asked."""

    workload: Workload = None
    trace: Trace = None
    trace_format: TraceFormat = "auto"
    prompt_lengths: InputLen = None
    output_lengths: OutputLen = None
    num_requests: NumRequests = None
    max_prompt_tokens: MaxInput = None
    max_output_tokens: MaxOutput = None
    seed: Seed = 0

    def traffic(self) -> Traffic:
        from foretell.benchmark.traffic import Traffic

        return Traffic(**asdict(self))


@dataclass(frozen=True)
class ArrivalsGroup:
    """When it is asked."""

    rate: Rate = None
    arrivals_kind: ArrivalsKind = "poisson"
    burstiness: Burstiness = None
    time_scale: TimeScale = 1.0
    duration_seconds: Duration = None

    def arrivals(self) -> Arrivals:
        """ConfigError where kind and burstiness contradict each other."""
        from foretell.benchmark.traffic import Arrivals, burstiness_of

        given = asdict(self)
        given["burstiness"] = burstiness_of(given.pop("arrivals_kind"), given["burstiness"])
        return Arrivals(**given)


@dataclass(frozen=True)
class BenchCapacity(o.Capacity):
    block_size: BlockSize = 16
    max_chunk_tokens: ChunkTokens = 0
    enable_prefix_caching: Caching = None


@dataclass(frozen=True)
class BenchEngine(BenchCapacity, o.Engine):
    """All that a benchmark may ask of an engine."""


def objectives(slo: str | None) -> Objectives:
    """ConfigError for what is no list of objectives."""
    from foretell.trace import Objectives

    return Objectives() if slo is None else Objectives.parse(slo)
