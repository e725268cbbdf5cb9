"""``foretell calibrate`` and ``foretell simulate``: measure this machine once, then ask it about any traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
from foretell.cli.groups import grouped
from foretell.config import PolicyName
from foretell.store.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from foretell.cost.profile import Profile

ProfileFile = Annotated[
    Path | None, typer.Option("--profile", "-p", help="Where to keep it; by default with the other calibrations.")
]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile",
        "-p",
        metavar="FILE|NAME",
        help="A calibration's file, or a device: cpu, h200, h100, l4, analytic:h200 …; "
        "by default the model's own on this machine.",
    ),
]


@grouped
def calibrate(weights: o.Weights, model: o.Model = DEFAULT_MODEL, output: ProfileFile = None) -> None:
    """Measure this model on this machine, a few minutes long, and keep the profile.

    Linear layers, head, decode and prefill attention are measured apart, by what their time depends on: the number
    of tokens for the first two, what they look back on for the others. Steps that were not used say how good it is.

    [bold]Examples[/bold]

      foretell calibrate
      foretell calibrate gemma3-270m --profile gemma.json
      foretell calibrate ./config-folder --load-format dummy --device cuda
    """
    from foretell.benchmark.commands import check_writable
    from foretell.cli.session import open_model
    from foretell.cost.calibrate import calibrate as measure
    from foretell.cost.machine import kv_bytes_to_measure
    from foretell.cost.named import own_path
    from foretell.progress import points_bar

    check_writable(output)
    options = weights.options()
    kv_bytes = options.pop("kv_cache_bytes", None) or kv_bytes_to_measure(options.get("device", "auto"))
    with open_model(model, **options, kv_cache_bytes=kv_bytes, enable_prefix_caching=False) as llm:
        with points_bar("calibrating") as report:
            profile = measure(llm, report)
        path = output or own_path(profile.model)
        profile.save(path)
    say_profile(profile)
    print(f"kept in {path}")


def say_profile(profile: Profile) -> None:
    from foretell.benchmark.tables import number, table

    rows = [
        (f"{tokens:.0f}", number(1e3 * seconds), number(1e6 * seconds / tokens))
        for tokens, seconds in zip(profile.linear.x, profile.linear.y, strict=True)
    ]
    print(table(("tokens in a step", "linear layers, ms", "µs/token"), rows))
    rates = [
        (f"{sequences:.0f}", *(number(1e9 * rate) for rate in row.y))
        for sequences, row in zip(profile.decode_rate.sizes, profile.decode_rate.rows, strict=True)
    ]
    widest = max(profile.decode_rate.rows, key=lambda row: len(row.x))
    print()
    print(table(("decode attention, ns per key", *(f"{2**x:.0f} keys" for x in widest.x)), [
        (*row, *[""] * (len(widest.x) + 1 - len(row))) for row in rates
    ]))  # fmt: skip
    low, high = 100 * (profile.low - 1), 100 * (profile.high - 1)
    error = f"median error {100 * profile.median_error:.1f} %, 90 % within {low:+.0f} … {high:+.0f} %"
    print(f"\n{len(profile.held_out)} steps held out: {error}")


@grouped
def simulate(
    what: b.TrafficGroup,
    when: b.ArrivalsGroup,
    capacity: b.BenchCapacity,
    model: o.Model = DEFAULT_MODEL,
    profile: ProfileName = None,
    compare_policies: b.ComparePolicies = False,
    slo: b.Slo = None,
    json_file: b.JsonFile = None,
    timeline: Annotated[
        Path | None, typer.Option(help="Write steps and requests to this file, for ui.perfetto.dev.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the run: a name that ends in .svg or .html.")] = None,
    offline: o.Offline = False,
) -> None:
    """How fast would it be? The engine's own scheduler, in virtual time, on a calibrated machine.

    Nothing is loaded and nothing waits: an hour of traffic takes seconds.

    [bold]Examples[/bold]

      foretell simulate --rate 2
      foretell simulate --rate 2 --compare-policies --slo ttft=500ms,tpot=60ms
      foretell simulate --trace azure.csv --num-requests 1000 --time-scale 20
      foretell simulate ./llama-3.1-8b --profile h200 --rate 20 --duration 60 --timeline run.json --plot run.svg
    """
    from foretell.assembly import EngineOptions
    from foretell.benchmark import predict
    from foretell.benchmark.commands import Asked, check_writable, finish, with_rate
    from foretell.loadgen.plot import check_plot_name

    objectives = b.objectives(slo)
    asked = Asked(model, capacity.options() | {"offline": offline or None}, what.traffic(), 1, json_file)
    asked.check()
    asked, arrivals = with_rate(asked, when.arrivals())
    check_plot_name(plot)
    for file in (timeline, plot):
        check_writable(file)
    subject = predict.simulated(EngineOptions(model=model, **asked.engine_options()), profile)
    built = arrivals.apply(asked.traffic.build(subject.profile.spec.vocab_size, None), asked.traffic.seed)
    subject.check(built)
    policies: tuple[PolicyName, ...] = get_args(PolicyName) if compare_policies else (subject.config.policy,)
    result = predict.run(
        subject, built, policies=policies, objectives=objectives, say=print, timeline=timeline, plot=plot
    )
    finish(result, json_file)
