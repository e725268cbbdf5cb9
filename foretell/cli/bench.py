"""``foretell bench offline`` and ``online``: theory, then measurement, then one JSON line."""

from __future__ import annotations

from typing import Any

import typer

from foretell.cli import bench_options as b
from foretell.cli import options as o
from foretell.cli.bench_scaling import scaling
from foretell.cli.bench_serve import serve
from foretell.cli.guard import guarded
from foretell.store.aliases import DEFAULT_MODEL

bench_app = typer.Typer(
    help="Measure: theory first, then the engine, then one JSON line.", no_args_is_help=True, rich_markup_mode="rich"
)

bench_app.command("serve")(serve)


def _given(**options: Any) -> dict[str, Any]:
    return options


@bench_app.command()
@guarded
def offline(
    model: b.Model = DEFAULT_MODEL,
    workload: b.Workload = None,
    trace: b.Trace = None,
    trace_format: b.TraceFormat = "auto",
    input_len: b.InputLen = "128",
    output_len: b.OutputLen = "128",
    num_requests: b.NumRequests = None,
    max_input_len: b.MaxInput = None,
    max_output_len: b.MaxOutput = None,
    seed: b.Seed = 0,
    repeat: b.Repeat = 3,
    warmup: b.WarmupRuns = 1,
    json_file: b.JsonFile = None,
    dtype: o.Dtype = "auto",
    load_format: o.Format = "auto",
    max_model_len: o.MaxModelLen = None,
    kv_cache_bytes: o.KVCacheBytes = None,
    block_size: b.BlockSize = 16,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxBatchedTokens = None,
    max_chunk_tokens: b.ChunkTokens = 0,
    policy: o.Policy = "mixed",
    prefix_caching: b.Caching = None,
    threads: o.Threads = None,
    tp: o.TP = 1,
    pp: o.PP = 1,
    kernels: o.KernelsName = "auto",
    device: o.Device = "auto",
    memory_share: o.MemoryShare = 0.9,
    no_network: o.Offline = False,
) -> None:
    """All requests at once, as fast as the engine goes; figures are medians of --repeat runs.

    ms per decode step = (median wall - median wall with one output token) ÷ (output tokens - 1).

    [bold]Examples[/bold]

      foretell bench offline --workload cpu-decode
      foretell bench offline smollm2-135m --input-len 64-256 --output-len 128 --num-requests 16
      foretell bench offline ./config-folder --load-format dummy --workload decode-b32 --dtype bfloat16
    """
    from foretell.benchmark.commands import Asked, run_offline
    from foretell.benchmark.traffic import Traffic

    traffic = Traffic(
        workload, trace, trace_format, input_len, output_len, num_requests, max_input_len, max_output_len, seed
    )
    options = _given(
        dtype=dtype, load_format=load_format, max_model_len=max_model_len, kv_cache_bytes=kv_cache_bytes,
        block_size=block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        max_chunk_tokens=max_chunk_tokens, policy=policy, enable_prefix_caching=prefix_caching,
        num_threads=threads, tp=tp, pp=pp, kernels=kernels,
        device=device, memory_share=memory_share, offline=no_network or None, seed=seed,
    )  # fmt: skip
    run_offline(Asked(model, options, traffic, repeat, json_file), warmup=warmup)


@bench_app.command()
@guarded
def online(
    model: b.Model = DEFAULT_MODEL,
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
    repeat: b.Repeat = 1,
    warmup: b.Warmup = True,
    virtual: b.Virtual = False,
    slo_ttft_ms: b.SloTTFT = None,
    slo_tpot_ms: b.SloTPOT = None,
    slo_e2e_ms: b.SloE2E = None,
    json_file: b.JsonFile = None,
    dtype: o.Dtype = "auto",
    load_format: o.Format = "auto",
    max_model_len: o.MaxModelLen = None,
    kv_cache_bytes: o.KVCacheBytes = None,
    block_size: b.BlockSize = 16,
    max_num_seqs: o.MaxNumSeqs = None,
    max_num_batched_tokens: o.MaxBatchedTokens = None,
    max_chunk_tokens: b.ChunkTokens = 0,
    policy: o.Policy = "mixed",
    prefix_caching: b.Caching = None,
    threads: o.Threads = None,
    tp: o.TP = 1,
    pp: o.PP = 1,
    kernels: o.KernelsName = "auto",
    device: o.Device = "auto",
    memory_share: o.MemoryShare = 0.9,
    no_network: o.Offline = False,
) -> None:
    """Traffic that does not wait: requests are sent when they are due, and latencies count from then.

    [bold]Examples[/bold]

      foretell bench online --rate 2 --num-requests 50 --input-len 64-256 --output-len 64
      foretell bench online --trace azure.csv --time-scale 10 --duration 60 --slo-ttft-ms 2000 --slo-tpot-ms 100
      foretell bench online --rate 4 --duration 20 --compare-policies
    """
    from foretell.benchmark.commands import Asked, run_online
    from foretell.benchmark.traffic import Arrivals, Traffic

    arrivals = Arrivals(rate, burstiness, time_scale, duration)
    traffic = Traffic(
        workload, trace, trace_format, input_len, output_len, num_requests, max_input_len, max_output_len, seed
    )
    options = _given(
        dtype=dtype, load_format=load_format, max_model_len=max_model_len, kv_cache_bytes=kv_cache_bytes,
        block_size=block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        max_chunk_tokens=max_chunk_tokens, policy=policy, enable_prefix_caching=prefix_caching,
        num_threads=threads, tp=tp, pp=pp, kernels=kernels,
        device=device, memory_share=memory_share, offline=no_network or None, seed=seed,
    )  # fmt: skip
    run_online(
        Asked(model, options, traffic, repeat, json_file), arrivals,
        objectives_ms=(slo_ttft_ms, slo_tpot_ms, slo_e2e_ms), compare_policies=compare_policies, warmup=warmup,
        virtual=virtual,
    )  # fmt: skip


bench_app.command("scaling")(guarded(scaling))
