"""``foretell bench scaling``: what more ranks bring, beside what they have to say to each other."""

from __future__ import annotations

from typing import Annotated

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
from foretell.cli.groups import grouped
from foretell.store.aliases import DEFAULT_MODEL

Layouts = Annotated[str, typer.Option(help="TPxPP, the first one being the base: 1x1,2x1,1x2.")]
Rounds = Annotated[int, typer.Option(min=1, help="Each layout is started and measured so often, in turn.")]


@grouped
def scaling(
    what: b.TrafficGroup,
    capacity: b.BenchCapacity,
    weights: o.Weights,
    model: o.Model = DEFAULT_MODEL,
    layouts: Layouts = "1x1,1x2",
    rounds: Rounds = 2,
    json_file: b.JsonFile = None,
) -> None:
    """The same work with one process and with several: speed-up, efficiency, communication volume.

    Each rank has a GPU where there are enough for the largest layout. Else the ranks share the machine's threads:
    they add no arithmetic then, and the speed-up shows what communication costs.

    [bold]Examples[/bold]

      foretell bench scaling --layouts 1x1,1x2,3x1
      foretell bench scaling ./config-folder --load-format dummy --layouts 1x1,2x1,4x1 --workload decode-b32
    """
    from foretell.benchmark.commands import check_writable, finish
    from foretell.benchmark.scaling import device_for, parse_layouts, run
    from foretell.cli.session import open_model
    from foretell.llm import LLM
    from foretell.model.load import spec_for
    from foretell.store import resolve

    wanted = parse_layouts(layouts)
    traffic, options = what.traffic(), weights.options() | capacity.options()
    traffic.check()
    check_writable(json_file)
    options["enable_prefix_caching"] = bool(options["enable_prefix_caching"])
    options["device"] = device_for(wanted, options["device"])
    spec = spec_for(resolve(model, offline=options["offline"]))

    def open_llm(tp: int, pp: int) -> LLM:
        return open_model(model, **options, seed=what.seed, tp=tp, pp=pp)

    result = run(
        wanted, open_llm, spec, lambda: traffic.build(spec.vocab_size, None), rounds=rounds, device=options["device"],
        say=print,
    )  # fmt: skip
    finish({"model": model, **result}, json_file)
