"""`foretell simulate`: the engine's own scheduler on a calibrated cost model, in virtual time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.benchmark.latency import goodput_line, latency_table, offered_load
from foretell.benchmark.online_report import trade_off
from foretell.benchmark.recording import Load, Recording, write_timeline
from foretell.benchmark.simulate import VirtualRun, simulate
from foretell.benchmark.tables import number
from foretell.config import PolicyName, SchedulerConfig
from foretell.cost.devices import DEVICES
from foretell.cost.floor import WeightBytes
from foretell.cost.hardware import BYTES_PER_ELEMENT
from foretell.cost.named import open_profile
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from foretell.trace.metrics import Objectives, Report, summarize
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.assembly import EngineOptions

Say = Callable[[str], None]
BESIDE_SHARE = 0.03  # of a device's memory, for activations and graphs


@dataclass(frozen=True, slots=True)
class Simulated:
    """A model on a profiled machine, as it would be configured there."""

    profile: Profile
    config: SchedulerConfig
    num_blocks: tuple[int, ...]

    def check(self, workload: Workload) -> None:
        """ConfigError when a request of the workload is longer than a sequence may be."""
        longest = max(request.prompt_len + request.output_len for request in workload.requests)
        held = min(
            blocks * self.config.block_size
            for blocks, group in zip(self.num_blocks, self.profile.spec.kv_groups, strict=True)
            if group.window is None or len(self.num_blocks) == 1
        )
        most = min(self.config.max_model_len, held)
        if longest > most:
            raise ConfigError(
                f"workload {workload.name} has a request of {longest} tokens and the engine serves up to {most}: "
                "raise max_model_len or kv_cache_bytes, or cap the lengths"
            )


def simulated(options: EngineOptions, profile_name: str | None) -> Simulated:
    """Nothing is loaded: the cache gets what this machine would give it, or the memory of the profile's device."""
    from foretell.memory import default_kv_bytes
    from foretell.model.load import resolve_dtype, spec_for
    from foretell.options import context_len, scheduler_config
    from foretell.store import resolve
    from foretell.worker.kv import plan_blocks

    files = resolve(options.model, offline=options.offline)
    spec, dtype = spec_for(files), resolve_dtype(options.dtype, files)
    name = str(dtype).removeprefix("torch.")
    profile = open_profile(profile_name, spec, model=files.name, dtype=name)
    on_gpu = profile.device in DEVICES and profile.device != "laptop"
    gpu_bytes = int(DEVICES[profile.device].memory_bytes) if on_gpu else 0
    config = scheduler_config(options, context_len(options, spec), "cuda" if on_gpu else "cpu", gpu_bytes)
    kv_bytes = options.kv_cache_bytes
    if kv_bytes is None and profile.device in DEVICES:
        kv_bytes = device_kv_bytes(profile, options.memory_share)
    num_blocks = plan_blocks(spec, config, kv_bytes or default_kv_bytes(), BYTES_PER_ELEMENT[name])
    return Simulated(profile, config, num_blocks)


def device_kv_bytes(profile: Profile, memory_share: float) -> int:
    """What a device's memory leaves for the cache beside weights and activations. ConfigError if it is nothing."""
    weights = WeightBytes.in_dtype(profile.spec, profile.dtype)
    tables = weights.embedding_row * profile.spec.vocab_size + (0 if profile.spec.tied_embeddings else weights.head)
    device = DEVICES[profile.device]
    left = (memory_share - BESIDE_SHARE) * device.memory_bytes - weights.layers - tables
    if left <= 0:
        raise ConfigError(
            f"{profile.model} takes {(weights.layers + tables) / 1e9:.1f} GB and {device.name} does not hold it: "
            "choose a larger device"
        )
    return int(left)


def run(
    subject: Simulated,
    workload: Workload,
    *,
    policies: Sequence[PolicyName],
    objectives: Objectives,
    say: Say,
    timeline: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Predicted latencies of every policy on the same arrivals; what goes into the JSON line."""
    profile = subject.profile
    _say_heading(profile, workload, say)
    reports: dict[PolicyName, Report] = {}
    figures: dict[str, Any] = {}
    for policy in policies:
        cost, started, recording = StepCost(profile), time.perf_counter(), Recording()
        windows = [group.window for group in profile.spec.kv_groups]
        found = simulate(
            workload, profile.spec.vocab_size, replace(subject.config, policy=policy), subject.num_blocks, windows,
            cost, overlaps=profile.overlaps, recording=recording,
        )  # fmt: skip
        wall = time.perf_counter() - started
        report = reports[policy] = summarize(found.requests, objectives)
        load = recording.load(found.seconds)
        _say_policy(policy, report, found, load, cost, wall, objectives, say)
        several = policy if len(policies) > 1 else None
        if timeline is not None:
            file = _named(timeline, several)
            write_timeline(file, found.requests, recording.moments, f"{profile.model}, {policy}")
            say(f"timeline for ui.perfetto.dev: {file}")
        if plot is not None:
            _plot(_named(plot, several), f"{profile.model}, {policy}, foretold", found, report, objectives, say)
        beyond = cost.beyond / max(1, cost.steps)
        figures[policy] = {
            **report.as_dict(), "load": load.as_dict(), "steps": found.steps, "beyond_share": beyond,
            "wall_seconds": wall, "virtual_seconds": found.seconds,
        }  # fmt: skip
    say(trade_off(reports, objectives))
    return {
        "bench": "simulate",
        "model": profile.model,
        "hardware": profile.hardware,
        "calibrated": profile.created,
        "source": profile.source,
        "workload": workload.name,
        "requests": len(workload.requests),
        "objectives": asdict(objectives),
        "step_interval": [profile.low, profile.high],
        "step_intervals": {kind: list(bounds) for kind, bounds in profile.intervals.items()},
        "predicted": figures,
    }


def _say_heading(profile: Profile, workload: Workload, say: Say) -> None:
    say(f"{profile.model}, {profile.weight_format} weights, on {profile.hardware} ({profile.created[:10]})")
    if profile.note:
        say(f"the profile is {profile.note}")
    say(f"workload {workload.name}: {workload.description}; offered: {offered_load(workload)}")
    low, high = f"{100 * (profile.low - 1):+.0f}", f"{100 * (profile.high - 1):+.0f}"
    judged = "a guess: nothing was measured" if profile.source == "analytic" else "by held-out steps"
    say(f"a step is within {low} … {high} % of its prediction nine times in ten, {judged}")


def _say_policy(
    policy: PolicyName,
    report: Report,
    found: VirtualRun,
    load: Load,
    cost: StepCost,
    wall: float,
    objectives: Objectives,
    say: Say,
) -> None:
    say(f"\n{policy}")
    say(latency_table(report))
    say(
        f"{number(report.requests_per_second)} requests/s, {number(report.output_tokens_per_second)} output "
        f"tok/s; preemptions {report.preemptions}"
    )
    say(
        f"busy {100 * load.busy_share:.0f} % of the time, {number(load.sequences_per_step)} sequences a step; "
        f"KV cache {100 * load.kv_usage_mean:.1f} % on average, {100 * load.kv_usage_max:.1f} % at most; waiting "
        f"{number(load.waiting_mean)} on average, {load.waiting_max} at most"
    )
    say(
        f"{found.steps:,} steps, {number(found.seconds)} s of virtual time in {number(wall)} s: "
        f"{number(found.seconds / wall)} times as fast as it would be"
    )
    if objectives.any:
        say(goodput_line(report))
    beyond = cost.beyond / max(1, cost.steps)
    if beyond > 0.01:
        say(f"warning: {100 * beyond:.0f} % of the steps lie beyond what was measured; their figures are guesses")


def _plot(file: Path, title: str, found: VirtualRun, report: Report, objectives: Objectives, say: Say) -> None:
    from foretell.loadgen.plot import picture, write_plot

    write_plot(file, picture(title, found.requests, report, objectives), latency_table(report))
    say(f"plot: {file}")


def _named(file: Path, policy: str | None) -> Path:
    return file if policy is None else file.with_name(f"{file.stem}-{policy}{file.suffix}")
