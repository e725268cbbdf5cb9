"""The command, from checked options to the JSON line."""

from __future__ import annotations

import math
import secrets
import sys
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.benchmark.commands import check_writable, encoder, finish
from foretell.benchmark.latency import latency_table, offered_load
from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.errors import ConfigError
from foretell.loadgen import plot, report
from foretell.loadgen.drive import Driver, Pace, Run, run_loop
from foretell.loadgen.http import HttpClient
from foretell.loadgen.interface import Interface, Probed, model_of, probe
from foretell.loadgen.prompts import PromptMaker
from foretell.loadgen.target import Target
from foretell.trace.metrics import Objectives
from foretell.trace.workloads import TraceRequest, Workload

if TYPE_CHECKING:
    from foretell.store import Tokenizer

DEFAULT_REQUESTS = 100
UNKNOWN_VOCABULARY = 32_000
WARMUP_TOKENS = 4
PROMPT_SEEDS = 1 << 24


@dataclass(frozen=True, slots=True)
class Asked:
    """``interface.model`` of "" means the first one that the server lists. Without a ``prompt_seed`` every run has
    other prompts, or a second run would find its own in the server's prefix cache and measure that."""

    target: Target
    interface: Interface
    traffic: Traffic
    arrivals: Arrivals
    pace: Pace
    objectives: Objectives
    tokenizer: str | None = None
    warmup: int = 4
    prompt_seed: int | None = None
    json_file: Path | None = None
    with_records: bool = False
    plot_file: Path | None = None


def run_serve(asked: Asked) -> None:
    """Everything that can be known to be wrong is found before the first request."""
    plot.check_plot_name(asked.plot_file)
    for file in (asked.plot_file, asked.json_file):
        check_writable(file)
    if asked.with_records and asked.json_file is None:
        raise ConfigError("--records go into the file that --json names: give it")
    asked.traffic.check()
    asked = with_loop(asked)
    if asked.prompt_seed is None:
        asked = replace(asked, prompt_seed=secrets.randbelow(PROMPT_SEEDS))
    tokenizer = None if asked.tokenizer is None else _tokenizer(asked.tokenizer)
    workload = _workload(asked, tokenizer)
    probed, run = run_loop(_serve(asked, workload, tokenizer))
    _finish(asked, workload, probed, run)


def with_loop(asked: Asked) -> Asked:
    """Open or closed? A concurrency without a rate or a trace's own times means closed; nothing means 1/s."""
    arrivals, pace, traffic = asked.arrivals, asked.pace, asked.traffic
    timed, at_a_rate = traffic.timed, arrivals.rate is not None and math.isfinite(arrivals.rate)
    closed = pace.max_concurrency is not None and not timed and not at_a_rate
    if closed and arrivals.ramp_to is not None:
        raise ConfigError("--ramp-to is of arrival rates, and a closed loop has none: give --rate")
    if closed:
        arrivals.check(timed=False)
        arrivals = replace(arrivals, rate=None, duration_seconds=None)
        pace = replace(pace, closed=True, duration_seconds=asked.arrivals.duration_seconds)
    elif not timed and arrivals.rate is None:
        arrivals = replace(arrivals, rate=1.0)
    arrivals.check(timed=timed)
    if not timed and traffic.num_requests is None and traffic.workload is None:
        needed = DEFAULT_REQUESTS if closed else arrivals.requests_needed() or DEFAULT_REQUESTS
        traffic = replace(traffic, num_requests=needed)
    return replace(asked, arrivals=arrivals, pace=pace, traffic=traffic)


def _workload(asked: Asked, tokenizer: Tokenizer | None) -> Workload:
    vocab_size = UNKNOWN_VOCABULARY if tokenizer is None else tokenizer.vocab_size
    found = asked.traffic.build(vocab_size, encoder(tokenizer), default_requests=DEFAULT_REQUESTS)
    return asked.arrivals.apply(found, asked.traffic.seed)


def _tokenizer(reference: str) -> Tokenizer:
    from foretell.store import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(reference))
    if tokenizer is None:
        raise ConfigError(f"--tokenizer {reference}: it has none")
    return tokenizer


async def _serve(asked: Asked, workload: Workload, tokenizer: Tokenizer | None) -> tuple[Probed, Run]:
    with closing(HttpClient(asked.target)) as client:
        interface = asked.interface
        if not interface.model:
            interface = replace(interface, model=await model_of(client))
        probed = await probe(client, interface)
        prompts = _prompts(workload, tokenizer, probed, _variant(asked))
        _say_before(asked, workload, prompts, probed)
        if asked.warmup:
            await _warm_up(asked, client, probed.interface, prompts)
        endless = asked.pace.closed and asked.pace.duration_seconds is not None
        with _bar(None if endless else len(workload.requests)) as advance:
            driver = Driver(client, probed.interface, prompts, asked.pace, advance=advance)
            return probed, await driver.run(variant=_variant(asked))


def _bar(total: int | None) -> Any:
    from foretell.progress import generation_bar

    return generation_bar(total) if sys.stderr.isatty() else nullcontext()


def _prompts(workload: Workload, tokenizer: Tokenizer | None, probed: Probed, variant: int) -> PromptMaker:
    if tokenizer is None:
        per_word, overhead = probed.tokens_per_word or 1.0, probed.overhead_tokens or 0.0
        return PromptMaker(workload, tokens_per_word=per_word, overhead_tokens=overhead, own_variant=variant)
    as_ids = probed.interface.endpoint == "completions"
    return PromptMaker(workload, tokenizer, tokenizer.vocab_size, as_ids, own_variant=variant)


def _variant(asked: Asked) -> int:
    """Of the workload's prompts; below it stands the warm-up's."""
    return 2 + 2 * (asked.prompt_seed or 0)


async def _warm_up(asked: Asked, client: HttpClient, interface: Interface, prompts: PromptMaker) -> None:
    """Short answers, all at once, to prompts like the workload's that share nothing with it."""
    first = prompts.workload.requests[: asked.warmup]
    requests = tuple(TraceRequest(r.prompt_len, min(WARMUP_TOKENS, r.output_len)) for r in first)
    own = replace(prompts, workload=replace(prompts.workload, requests=requests))
    pace = Pace(closed=True, max_concurrency=asked.warmup, timeout_seconds=asked.pace.timeout_seconds)
    run = await Driver(client, interface, own, pace, advance=None).run(variant=_variant(asked) - 1)
    if run.interrupted:
        raise KeyboardInterrupt
    for kind, count in run.errors().items():
        print(f"note: {count} of {len(run.sent)} warm-up requests were not served: {kind}")


# -- words ------------------------------------------------------------------------------------------------


def _say_before(asked: Asked, workload: Workload, prompts: PromptMaker, probed: Probed) -> None:
    interface, pace = probed.interface, asked.pace
    print(f"{asked.target.url}{interface.path}, model {interface.model}")
    print(
        f"workload {workload.name}: {len(workload.requests)} requests, "
        f"{workload.prompt_tokens:,} prompt and {workload.output_tokens:,} output tokens"
    )
    print(f"prompts: {_prompt_words(prompts, probed)}")
    for note in probed.notes:
        print(f"note: {note}")
    if pace.closed:
        print(
            f"closed loop: {pace.max_concurrency} users, each sends its next request when the last one is answered; "
            "a slow server gets fewer requests, so these latencies are not those of independent arrivals"
        )
        return
    print(f"open loop, offered: {offered_load(workload)}; latencies count from when a request is due")
    if pace.max_concurrency is not None:
        print(f"at most {pace.max_concurrency} at once: the others wait here, and that wait counts")


def _prompt_words(prompts: PromptMaker, probed: Probed) -> str:
    if prompts.as_ids:
        return "token ids, of exact length"
    if prompts.tokenizer is not None:
        return "text of the tokenizer's tokens, plus what the chat template adds"
    if all(request.prompt_text is not None for request in prompts.workload.requests):
        return "the trace's own texts; lengths above are estimates at 4 characters per token"
    if probed.tokens_per_word is None:
        return "common words, taken for one token each: the server counts nothing that could tell"
    return (
        f"common words; this server makes {prompts.tokens_per_word:.3g} tokens of each "
        f"and adds {prompts.overhead_tokens:.0f} to a prompt"
    )


def _finish(asked: Asked, workload: Workload, probed: Probed, run: Run) -> None:
    measured = report.report_of(run, asked.objectives)
    report.say_run(run, measured, asked.pace, asked.objectives, print)
    if asked.plot_file is not None:
        title = f"{probed.interface.model}, {workload.name}: {_load(asked, workload)}"
        times = [sent.times() for sent in report.finished(run)]
        svg = plot.picture(title, times, measured, asked.objectives)
        plot.write_plot(asked.plot_file, svg, latency_table(measured))
        print(f"plot: {asked.plot_file}")
    result = {
        "bench": "serve",
        "url": asked.target.url,
        "endpoint": probed.interface.endpoint,
        "model": probed.interface.model,
        "loop": "closed" if asked.pace.closed else "open",
        "max_concurrency": asked.pace.max_concurrency,
        "arrivals": _arrivals(asked),
        "workload": workload.name,
        "requests": len(workload.requests),
        "prompt_tokens_asked": workload.prompt_tokens,
        "output_tokens_asked": workload.output_tokens,
        "ignore_eos": probed.interface.ignore_eos,
        "seed": asked.traffic.seed,
        "prompt_seed": asked.prompt_seed,
        "objectives": asdict(asked.objectives),
        **report.as_dict(run, measured),
    }
    finish(result, asked.json_file, {"records": report.records(run)} if asked.with_records else None)
    if run.interrupted:
        raise KeyboardInterrupt


def _load(asked: Asked, workload: Workload) -> str:
    return f"{asked.pace.max_concurrency} users" if asked.pace.closed else offered_load(workload)


def _arrivals(asked: Asked) -> dict[str, float | str | None]:
    """JSON knows no infinity: an infinite rate or burstiness becomes "inf"."""
    found: dict[str, float | str | None] = asdict(asked.arrivals)
    if asked.pace.closed:
        found["duration_seconds"] = asked.pace.duration_seconds
    return {name: "inf" if value == math.inf else value for name, value in found.items()}
