"""``foretell bench scaling``: what more ranks bring, beside what they have to say to each other."""

from __future__ import annotations

from typing import Annotated

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
from foretell.store.aliases import DEFAULT_MODEL

Layouts = Annotated[str, typer.Option(help="TPxPP, the first one being the base: 1x1,2x1,1x2.")]
Rounds = Annotated[int, typer.Option(min=1, help="Each layout is started and measured so often, in turn.")]


def scaling(
    model: b.Model = DEFAULT_MODEL,
    layouts: Layouts = "1x1,1x2",
    rounds: Rounds = 2,
    workload: b.Workload = None,
    input_len: b.InputLen = "64",
    output_len: b.OutputLen = "64",
    num_requests: b.NumRequests = None,
    seed: b.Seed = 0,
    json_file: b.JsonFile = None,
    dtype: o.Dtype = "auto",
    load_format: o.Format = "auto",
    max_model_len: o.MaxModelLen = None,
    kv_cache_bytes: o.KVCacheBytes = None,
    threads: o.Threads = None,
    kernels: o.KernelsName = "auto",
    no_network: o.Offline = False,
) -> None:
    """The same work with one process and with several: speed-up, efficiency, communication volume.

    The threads of the machine are shared by the ranks; on one machine without accelerators more ranks add no
    arithmetic, so the speed-up shows what communication costs.

    [bold]Examples[/bold]

      foretell bench scaling --layouts 1x1,1x2,3x1
      foretell bench scaling ./config-folder --load-format dummy --layouts 1x1,2x1,4x1 --workload decode-b32
    """
    from foretell.benchmark.commands import finish
    from foretell.benchmark.scaling import parse_layouts, run
    from foretell.benchmark.traffic import Traffic
    from foretell.cli.session import open_model
    from foretell.llm import LLM
    from foretell.model.load import spec_for
    from foretell.store import resolve

    wanted = parse_layouts(layouts)
    traffic = Traffic(workload, None, "auto", input_len, output_len, num_requests, None, None, seed)
    traffic.check()
    spec = spec_for(resolve(model, offline=no_network or None))

    def open_llm(tp: int, pp: int) -> LLM:
        return open_model(
            model, dtype=dtype, load_format=load_format, max_model_len=max_model_len, kv_cache_bytes=kv_cache_bytes,
            num_threads=threads, kernels=kernels, offline=no_network or None, tp=tp, pp=pp,
            enable_prefix_caching=False,
        )  # fmt: skip

    result = run(wanted, open_llm, spec, lambda: traffic.build(spec.vocab_size, None), rounds=rounds, say=print)
    finish({"model": model, **result}, json_file)
