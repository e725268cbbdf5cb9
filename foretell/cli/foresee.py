"""``foretell calibrate`` and ``foretell simulate``: measure this machine once, then ask it about any traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
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


def calibrate(
    model: b.Model = DEFAULT_MODEL,
    output: ProfileFile = None,
    dtype: o.Dtype = "auto",
    load_format: o.Format = "auto",
    threads: o.Threads = None,
    kernels: o.KernelsName = "auto",
    device: o.Device = "auto",
    memory_share: o.MemoryShare = 0.9,
    no_network: o.Offline = False,
) -> None:
    """Measure this model on this machine, a few minutes long, and keep the profile.

    Linear layers, head, decode and prefill attention are measured apart, by what their time depends on: the number
    of tokens for the first two, what they look back on for the others. Steps that were not used say how good it is.

    [bold]Examples[/bold]

      foretell calibrate
      foretell calibrate gemma3-270m --profile gemma.json
      foretell calibrate ./config-folder --load-format dummy --device cuda
    """
    from foretell.cli.session import open_model
    from foretell.cost.calibrate import calibrate as measure
    from foretell.cost.named import own_path
    from foretell.progress import points_bar

    with open_model(
        model, dtype=dtype, load_format=load_format, num_threads=threads, kernels=kernels,
        offline=no_network or None, enable_prefix_caching=False, device=device, memory_share=memory_share,
    ) as llm:  # fmt: skip
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


def simulate(
    model: b.Model = DEFAULT_MODEL,
    profile: ProfileName = None,
    workload: b.Workload = None,
    trace: b.Trace = None,
    trace_format: b.TraceFormat = "auto",
    input_len: b.InputLen = "128",
    output_len: b.OutputLen = "128",
    num_requests: b.NumRequests = None,
    max_input_len: b.MaxInput = None,
    max_output_len: b.MaxOutput = None,
    seed: b.Seed = 0,
    rate: b.Rate = None,
    burstiness: b.Burstiness = 1.0,
    time_scale: b.TimeScale = 1.0,
    duration: b.Duration = None,
    compare_policies: b.ComparePolicies = False,
    slo_ttft_ms: b.SloTTFT = None,
    slo_tpot_ms: b.SloTPOT = None,
    slo_e2e_ms: b.SloE2E = None,
    json_file: b.JsonFile = None,
    kv_cache_bytes: o.KVCacheBytes = None,
    block_size: b.BlockSize = 16,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxBatchedTokens = 2048,
    max_chunk_tokens: b.ChunkTokens = 0,
    max_model_len: o.MaxModelLen = None,
    policy: o.Policy = "mixed",
    prefix_caching: b.Caching = None,
    no_network: o.Offline = False,
) -> None:
    """How fast would it be? The engine's own scheduler, in virtual time, on a calibrated machine.

    Nothing is loaded and nothing waits: an hour of traffic takes seconds.

    [bold]Examples[/bold]

      foretell simulate --rate 2
      foretell simulate --rate 2 --compare-policies --slo-ttft-ms 500 --slo-tpot-ms 60
      foretell simulate --trace azure.csv --num-requests 1000 --time-scale 20
    """
    from foretell.assembly import EngineOptions
    from foretell.benchmark import predict
    from foretell.benchmark.commands import Asked, finish, with_rate
    from foretell.benchmark.setup import virtual_subject
    from foretell.benchmark.traffic import Arrivals, Traffic
    from foretell.cost.named import open_profile
    from foretell.trace import Objectives

    traffic = Traffic(
        workload, trace, trace_format, input_len, output_len, num_requests, max_input_len, max_output_len, seed
    )
    options: dict[str, Any] = {
        "kv_cache_bytes": kv_cache_bytes, "block_size": block_size, "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens, "max_chunk_tokens": max_chunk_tokens,
        "max_model_len": max_model_len, "policy": policy, "offline": no_network or None,
        "enable_prefix_caching": prefix_caching,
    }  # fmt: skip
    traffic.check()
    asked, arrivals = with_rate(
        Asked(model, options, traffic, 1, json_file), Arrivals(rate, burstiness, time_scale, duration)
    )
    subject = virtual_subject(EngineOptions(model=model, **asked.engine_options()))
    found = open_profile(profile, subject.spec, model=subject.name, dtype=subject.dtype)
    built = arrivals.apply(asked.traffic.build(subject.spec.vocab_size, None), asked.traffic.seed)
    subject.check(built)
    policies: tuple[PolicyName, ...] = get_args(PolicyName) if compare_policies else (policy,)
    objectives = Objectives(*(None if ms is None else ms / 1e3 for ms in (slo_ttft_ms, slo_tpot_ms, slo_e2e_ms)))
    result = predict.run(
        found, built, subject.config, subject.num_blocks, policies=policies, objectives=objectives, say=print
    )
    finish(result, json_file)
