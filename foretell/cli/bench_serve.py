"""``foretell bench serve``: load for a server, ours or another."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foretell.cli import bench_options as b
from foretell.cli.groups import grouped
from foretell.errors import ConfigError

_WHERE, _WHEN, _HOW = "Where it goes", "When it is asked", "How it is measured"

BaseURL = Annotated[str, typer.Option("--base-url", help="The server, with or without /v1.", rich_help_panel=_WHERE)]
Key = Annotated[
    str | None,
    typer.Option("--api-key", help="Else $OPENAI_API_KEY, which others cannot read off the process list.",
                 rich_help_panel=_WHERE),
]  # fmt: skip
Model = Annotated[
    str | None, typer.Option("--model", help="The first one the server lists if not given.", rich_help_panel=_WHERE)
]
EndpointName = Annotated[Literal["completions", "chat"], typer.Option(help="Interface.", rich_help_panel=_WHERE)]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="A model whose tokenizer makes prompts of exact length; else words, counted by the server.",
        rich_help_panel=_WHERE,
    ),
]
IgnoreEOS = Annotated[
    bool,
    typer.Option("--ignore-eos/--stop-at-eos", help="Answers of exactly the asked length.", rich_help_panel=_WHERE),
]
ExtraBody = Annotated[str | None, typer.Option(help="JSON object merged into every request.", rich_help_panel=_WHERE)]
RampTo = Annotated[
    float | None,
    typer.Option(help="The rate climbs (or falls) evenly from --rate to this.", rich_help_panel=_WHEN),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most requests at once. Without --rate or --trace: a closed loop.", rich_help_panel=_WHEN
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for one request.", rich_help_panel=_HOW)]
PromptSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=(1 << 24) - 1,
        help="The same prompts every time; by default new ones, which no prefix cache knows.",
        rich_help_panel="What is asked",
    ),
]
Records = Annotated[bool, typer.Option("--records", help="Every request's times into --json.", rich_help_panel=_HOW)]
Plot = Annotated[Path | None, typer.Option(help="Write a picture: FILE.svg or FILE.html.", rich_help_panel=_HOW)]


@dataclass(frozen=True)
class ServeArrivals(b.ArrivalsGroup):
    ramp_to: RampTo = None


@grouped
def serve(
    what: b.TrafficGroup,
    when: ServeArrivals,
    base_url: BaseURL = "http://127.0.0.1:8000",
    api_key: Key = None,
    model: Model = None,
    endpoint: EndpointName = "completions",
    tokenizer: TokenizerName = None,
    ignore_eos: IgnoreEOS = True,
    extra_body: ExtraBody = None,
    prompt_seed: PromptSeed = None,
    max_concurrency: Concurrency = None,
    timeout: Timeout = 600.0,
    warmup: b.WarmupRequests = 4,
    slo: b.Slo = None,
    json_file: b.JsonFile = None,
    records: Records = False,
    plot: Plot = None,
) -> None:
    """Load for any OpenAI-compatible server: requests are sent when they are due, and latencies count from then.

    [bold]Examples[/bold]

      foretell bench serve --rate 4 --num-requests 200 --input-len 64-256 --slo ttft=500ms,tpot=50ms
      foretell bench serve --endpoint chat --rate 1 --ramp-to 20 --duration 60 --plot run.svg
      foretell bench serve --trace azure.csv --time-scale 0.1 --duration 120 --json run.json --records
      foretell bench serve --max-concurrency 16 --num-requests 500
    """
    from foretell.loadgen.command import Asked, run_serve
    from foretell.loadgen.drive import Pace
    from foretell.loadgen.interface import Interface
    from foretell.loadgen.target import Target

    if not math.isfinite(timeout):
        raise ConfigError("--timeout must be a finite number of seconds")
    run_serve(
        Asked(
            target=Target.parse(base_url, api_key or os.environ.get("OPENAI_API_KEY")),
            interface=Interface(endpoint, model or "", ignore_eos, extra=_json_object(extra_body)),
            traffic=what.traffic(),
            arrivals=when.arrivals(),
            pace=Pace(max_concurrency=max_concurrency, timeout_seconds=timeout),
            objectives=b.objectives(slo),
            tokenizer=tokenizer,
            warmup=warmup,
            prompt_seed=prompt_seed,
            json_file=json_file,
            with_records=records,
            plot_file=plot,
        )
    )


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("--extra-body must be a JSON object, such as '{\"top_p\": 0.9}'")
    return value
