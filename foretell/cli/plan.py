"""``foretell plan``: which configuration serves this traffic best on these devices, and why."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
from foretell.cli.groups import grouped
from foretell.store.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from foretell.plan.plan import Plan

_GOAL = "What is wanted"

Slo = Annotated[
    str | None,
    typer.Option(
        help="Limits on percentiles: ttft_p99=0.5,tpot_p99=30ms (seconds or ms; any of ttft, tpot, e2e).",
        rich_help_panel=_GOAL,
    ),
]
Devices = Annotated[
    str,
    typer.Option(help="cpu (this machine), 2xH200, h100, laptop …: a wrong name lists them.", rich_help_panel=_GOAL),
]
ObjectiveName = Annotated[
    Literal["goodput", "latency", "cost"],
    typer.Option(
        help="Within the limits: most requests that keep them, lowest latencies, or fewest devices.",
        rich_help_panel=_GOAL,
    ),
]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        "-p",
        metavar="FILE|NAME",
        help="A calibration's file or a device's name; several for several ways to keep the weights. By default the "
        "model's own on this machine, or what is known of the device.",
        rich_help_panel=_GOAL,
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Keep the plan in this file too.", rich_help_panel="What comes out")
]
Explain = Annotated[
    bool,
    typer.Option("--explain", help="Plots, and every reason why one was left out.", rich_help_panel="What comes out"),
]
Svg = Annotated[
    Path | None, typer.Option("--svg", help="Draw the plan into this file.", rich_help_panel="What comes out")
]
Most = Annotated[
    int | None,
    typer.Option("--most", min=1, help="Simulate no more configurations than that.", rich_help_panel=_GOAL),
]


@grouped
def plan(
    what: b.TrafficGroup,
    when: b.ArrivalsGroup,
    model: o.Model = DEFAULT_MODEL,
    slo: Slo = None,
    devices: Devices = "cpu",
    objective: ObjectiveName = "goodput",
    profile: Profiles = None,
    max_model_len: o.MaxModelLen = None,
    most: Most = None,
    out: Out = None,
    explain: Explain = False,
    svg: Svg = None,
    as_json: o.JsonOutput = False,
    offline: o.Offline = False,
) -> None:
    """Choose layout, policy and limits for a workload: simulate what may win, say why it does, keep the plan.

    Nothing is loaded. The engine's own scheduler runs in virtual time on a calibrated machine, or on what data sheets
    say of one. [bold]foretell serve --plan FILE[/bold] starts the winner.

    [bold]Examples[/bold]

      foretell plan --rate 2 --slo ttft_p99=1,tpot_p99=0.1
      foretell plan --trace azure.csv --time-scale 20 --slo ttft_p99=2,tpot_p99=0.1 --out plan.json
      foretell plan ./llama-3.1-8b --devices 2xH200 --trace azure.csv --slo ttft_p99=0.5,tpot_p99=30ms
    """
    from foretell.benchmark.commands import check_writable
    from foretell.plan.command import PlanAsked, default_path, make_plan
    from foretell.plan.plan import save

    for file in (out, svg):
        check_writable(file)
    asked = PlanAsked(
        model, what.traffic(), when.arrivals(), slo, devices, objective, tuple(profile or ()), max_model_len, most,
        offline or None,
    )  # fmt: skip
    made = make_plan(asked, bar=planning_bar)
    data = made.as_dict()
    if made.winner is not None:
        for path in (default_path(model), *([out] if out else [])):
            save(data, path)
    _show(made, data, explain=explain, svg=svg, as_json=as_json)
    raise typer.Exit(0 if made.winner is not None else 1)


def planning_bar() -> AbstractContextManager[Any]:
    """On a terminal; elsewhere nothing is shown."""
    from foretell.progress import points_bar

    return points_bar("planning") if sys.stderr.isatty() else nullcontext(lambda done, total, what: None)


def _show(made: Plan, data: dict[str, Any], *, explain: bool, svg: Path | None, as_json: bool) -> None:
    from foretell.plan.draw import picture, plots
    from foretell.plan.words import reasons, report

    if as_json:
        print(json.dumps(data, allow_nan=False))
    else:
        for line in report(made):
            print(line)
    if explain and not as_json:
        print()
        print("\n".join(plots(made)))
        print("\nleft out:")
        for reason, count in reasons(made.found):
            print(f"  {count:4} × {reason}")
    if svg is not None:
        svg.write_text(picture(made), encoding="utf-8")
