"""What a finished request cost: a few lines for people, one object for programs."""

from __future__ import annotations

from math import exp, isfinite
from typing import TYPE_CHECKING, Any

from foretell.cli import units

if TYPE_CHECKING:
    from rich.table import Table

    from foretell.benchmark.beside import RequestForetold
    from foretell.core.messages import TokenLogprobs
    from foretell.llm import LLM
    from foretell.output import RequestMetrics, RequestOutput


def prefill_rate(result: RequestOutput) -> float | None:
    """Prompt tokens computed per second, from admission to the first token."""
    seconds = result.metrics.engine_ttft_seconds
    computed = len(result.prompt_token_ids) - result.metrics.cached_tokens
    return computed / seconds if seconds else None


def decode_rate(metrics: RequestMetrics) -> float | None:
    return 1 / metrics.tpot_seconds if metrics.tpot_seconds else None


def as_dict(llm: LLM, result: RequestOutput) -> dict[str, Any]:
    """JSON-ready. Seconds, bytes and tokens are named in the keys."""
    completion, metrics, assembly = result.outputs[0], result.metrics, llm.assembly
    return {
        "model": assembly.files.reference,
        "dtype": assembly.dtype,
        "weight_format": assembly.weight_format,
        "kernels": assembly.kernels,
        "prompt_token_ids": result.prompt_token_ids,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": None if completion.logprobs is None else [_logprob(llm, p) for p in completion.logprobs],
        "prompt_tokens": len(result.prompt_token_ids),
        "cached_prompt_tokens": metrics.cached_tokens,
        "output_tokens": len(completion.token_ids),
        "ttft_seconds": metrics.ttft_seconds,
        "engine_ttft_seconds": metrics.engine_ttft_seconds,
        "tpot_seconds": metrics.tpot_seconds,
        "e2e_seconds": metrics.e2e_seconds,
        "prefill_tokens_per_second": prefill_rate(result),
        "decode_tokens_per_second": decode_rate(metrics),
        **_foretold_figures(llm, result),
        "kv_bytes": metrics.kv_bytes,
        "kv_cache_bytes": assembly.kv_bytes,
        "kv_bytes_per_token": assembly.kv_bytes_per_token,
        "weight_bytes": assembly.weight_bytes,
        "max_model_len": assembly.max_model_len,
        "phases": assembly.phases,
        "load_seconds": sum(assembly.phases.values()),
    }


def _foretold_figures(llm: LLM, result: RequestOutput) -> dict[str, float | None]:
    predicted = foretold(llm, result)
    if predicted is None:
        return {}
    return {
        "predicted_engine_ttft_seconds": predicted.ttft_seconds,
        "predicted_tpot_seconds": predicted.tpot_seconds,
    }


def _logprob(llm: LLM, position: TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": i, "token": _token(llm, i), "logprob": _finite(p)} for i, p in position.top]
    return {
        "token_id": position.token_id,
        "token": _token(llm, position.token_id),
        "logprob": _finite(position.logprob),
        "rank": position.rank,
        "top": top,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinities: a token that was ruled out has null."""
    return value if isfinite(value) else None


def _token(llm: LLM, token_id: int) -> str | None:
    return None if llm.tokenizer is None else llm.tokenizer.token_text(token_id)


def print_summary(llm: LLM, result: RequestOutput, *, quiet: bool = False) -> None:
    """On stderr, so that stdout holds the text alone. When ``quiet``, only the log-probabilities, if asked for."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    logprobs = result.outputs[0].logprobs
    if logprobs:
        console.print(_logprob_table(llm, logprobs))
    if quiet:
        return
    assembly = llm.assembly
    kept = f"{assembly.weight_format} weights, {assembly.dtype} cache"
    console.rule(f"[dim]{assembly.files.name} · {kept} · {assembly.kernels} kernels[/dim]", style="dim")
    console.print(_table(llm, result))


def _table(llm: LLM, result: RequestOutput) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in _lines(llm, result):
        table.add_row(name, value)
    return table


def _lines(llm: LLM, result: RequestOutput) -> list[tuple[str, str]]:
    completion, metrics, assembly = result.outputs[0], result.metrics, llm.assembly
    cached = f" ({metrics.cached_tokens} from the prefix cache)" if metrics.cached_tokens else ""
    reason = completion.finish_reason or "—"
    if completion.stop_reason is not None:
        reason += f" ({_stop_text(llm, completion.stop_reason)})"
    phases = ", ".join(f"{name} {value:.2f}" for name, value in assembly.phases.items() if value >= 0.005)
    used = units.share(metrics.kv_bytes, assembly.kv_bytes)
    return [
        ("TTFT", f"{units.seconds(metrics.ttft_seconds)}  [dim]to the first token; "
                 f"{units.seconds(metrics.engine_ttft_seconds)} from admission[/dim]"),
        ("TPOT", f"{units.seconds(metrics.tpot_seconds)}  [dim]per output token after the first[/dim]"),
        ("prefill", f"{len(result.prompt_token_ids)} prompt tokens at {units.rate(prefill_rate(result))}{cached}"),
        ("decode", f"{len(completion.token_ids)} output tokens at {units.rate(decode_rate(metrics))}"),
        ("KV cache", f"{units.binary_bytes(metrics.kv_bytes)} of {units.binary_bytes(assembly.kv_bytes)} ({used}), "
                     f"{units.binary_bytes(assembly.kv_bytes_per_token)} per token"),
        *_foretold_line(llm, result),
        *_memory_line(llm),
        ("finish", reason),
        ("start-up", f"{sum(assembly.phases.values()):.2f} s  [dim]{phases}[/dim]"),
    ]  # fmt: skip


def foretold(llm: LLM, result: RequestOutput) -> RequestForetold | None:
    """What this machine's calibration says of the request, had it been alone; None where there is none."""
    from foretell.benchmark.beside import foretold_request, profile_of

    profile = profile_of(llm)
    if profile is None or len(result.outputs) > 1:
        return None
    return foretold_request(
        profile,
        len(result.prompt_token_ids),
        len(result.outputs[0].token_ids),
        cached_tokens=result.metrics.cached_tokens,
        budget=llm.assembly.engine.scheduler.config.max_num_batched_tokens,
    )


def _foretold_line(llm: LLM, result: RequestOutput) -> list[tuple[str, str]]:
    predicted = foretold(llm, result)
    if predicted is None:
        return []
    pairs = [
        ("TTFT from admission", predicted.ttft_seconds, result.metrics.engine_ttft_seconds),
        ("TPOT", predicted.tpot_seconds, result.metrics.tpot_seconds),
    ]
    words = [
        f"{name} {units.seconds(said)} ({100 * (said / measured - 1):+.0f} %)"
        for name, said, measured in pairs
        if said and measured
    ]
    return [("foretold", ", ".join(words))] if words else []


def _memory_line(llm: LLM) -> list[tuple[str, str]]:
    """The byte ledger of a GPU."""
    ledger = llm.assembly.ledger
    if ledger is None:
        return []
    parts = ", ".join(f"{name} {units.binary_bytes(size)}" for name, size in ledger.entries.items())
    planned, total = units.binary_bytes(ledger.planned_bytes), units.binary_bytes(ledger.total_bytes)
    return [("memory", f"{planned} of {total} planned  [dim]{parts}[/dim]")]


def _stop_text(llm: LLM, reason: str | int) -> str:
    from rich.markup import escape

    if isinstance(reason, str):
        return escape(repr(reason))
    return escape(f"token {reason} {_token(llm, reason) or ''}".rstrip())


def _logprob_table(llm: LLM, logprobs: list[TokenLogprobs]) -> Table:
    """Each token with its probability, its rank, and its rivals."""
    from rich.table import Table
    from rich.text import Text

    table = Table("token", "p", "rank", "likeliest", box=None, header_style="dim", pad_edge=False)
    table.columns[1].justify = table.columns[2].justify = "right"
    for position in logprobs:
        rivals = Text()
        for token_id, logprob in position.top:
            rivals.append(f"{_shown(llm, token_id)} ", style="cyan").append(f"{exp(logprob):.3f}   ", style="dim")
        table.add_row(
            Text(_shown(llm, position.token_id)), f"{exp(position.logprob):.3f}", str(position.rank), rivals
        )
    return table


def _shown(llm: LLM, token_id: int) -> str:
    token = _token(llm, token_id)
    return str(token_id) if token is None else repr(token)
