"""``foretell bench offline`` and ``online``: theory, then measurement, then one JSON line."""

from __future__ import annotations

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
from foretell.cli.bench_scaling import scaling
from foretell.cli.bench_serve import serve
from foretell.cli.groups import grouped
from foretell.cli.guard import Commands, guarded
from foretell.store.aliases import DEFAULT_MODEL

bench_app = typer.Typer(
    cls=Commands,
    help="Measure: theory first, then the engine, then one JSON line.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@grouped
def offline(
    what: b.TrafficGroup,
    engine: b.BenchEngine,
    model: o.Model = DEFAULT_MODEL,
    repeat: b.Repeat = 3,
    warmup: b.WarmupRuns = 1,
    json_file: b.JsonFile = None,
) -> None:
    """All requests at once, as fast as the engine goes; figures are medians of --repeat runs.

    ms per decode step = (median wall - median wall with one output token) ÷ (output tokens - 1).

    [bold]Examples[/bold]

      foretell bench offline --workload cpu-decode
      foretell bench offline smollm2-135m --input-len 64-256 --output-len 128 --num-requests 16
      foretell bench offline ./config-folder --load-format dummy --workload decode-b32 --dtype bfloat16
    """
    from foretell.benchmark.commands import Asked, run_offline

    options = engine.options() | {"seed": what.seed}
    run_offline(Asked(model, options, what.traffic(), repeat, json_file), warmup=warmup)


@grouped
def online(
    what: b.TrafficGroup,
    when: b.ArrivalsGroup,
    engine: b.BenchEngine,
    model: o.Model = DEFAULT_MODEL,
    compare_policies: b.ComparePolicies = False,
    repeat: b.Repeat = 1,
    warmup: b.WarmupRequests = 4,
    virtual: b.Virtual = False,
    slo: b.Slo = None,
    json_file: b.JsonFile = None,
) -> None:
    """Traffic that does not wait: requests are sent when they are due, and latencies count from then.

    [bold]Examples[/bold]

      foretell bench online --rate 2 --num-requests 50 --input-len 64-256 --output-len 64
      foretell bench online --trace azure.csv --time-scale 10 --duration 60 --slo ttft=2s,tpot=100ms
      foretell bench online --rate 4 --duration 20 --compare-policies
    """
    from foretell.benchmark.commands import Asked, run_online

    options = engine.options() | {"seed": what.seed}
    run_online(
        Asked(model, options, what.traffic(), repeat, json_file), when.arrivals(), objectives=b.objectives(slo),
        compare_policies=compare_policies, warmup=warmup, virtual=virtual,
    )  # fmt: skip


for name, command in {"offline": offline, "online": online, "serve": serve, "scaling": scaling}.items():
    bench_app.command(name)(guarded(command))
