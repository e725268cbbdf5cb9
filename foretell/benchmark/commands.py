"""The commands in this process, from checked options to the JSON line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from foretell.benchmark.traffic import DEFAULT_REQUESTS, Arrivals, Traffic
from foretell.config import PolicyName
from foretell.errors import ConfigError
from foretell.trace import Objectives, Workload

if TYPE_CHECKING:
    from foretell.store import Tokenizer
    from foretell.trace.readers import Encode

POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True)
class Asked:
    """What they are told."""

    model: str
    options: dict[str, Any]  # of the engine
    traffic: Traffic
    repeat: int
    json_file: Path | None

    def check(self) -> None:
        """ConfigError for what can be known to be wrong before a model is loaded."""
        self.traffic.check()
        check_writable(self.json_file)

    def engine_options(self) -> dict[str, Any]:
        """Random prompts share nothing, so unless it is asked for, only traces get a prefix cache."""
        caching = self.options["enable_prefix_caching"]
        if caching is None:
            caching = self.traffic.trace is not None
        return {**self.options, "enable_prefix_caching": caching}


def check_writable(file: Path | None) -> None:
    """ConfigError before a run of minutes rather than after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ConfigError(f"{file} cannot be written: its folder is missing, or it is a folder")


def run_offline(asked: Asked, *, warmup: int) -> None:
    from foretell.benchmark import offline
    from foretell.cli.session import open_model

    asked.check()
    with open_model(asked.model, **asked.engine_options()) as llm:
        workload = asked.traffic.build(llm.spec.vocab_size, encoder(llm.tokenizer))
        finish(offline.run(llm, workload, repeat=asked.repeat, warmup=warmup, say=print), asked.json_file)


def run_online(
    asked: Asked,
    arrivals: Arrivals,
    *,
    objectives: Objectives,
    compare_policies: bool,
    warmup: int,
    virtual: bool,
) -> None:
    asked.check()
    asked, arrivals = with_rate(asked, arrivals)
    own = asked.options["policy"]
    policies: tuple[PolicyName, ...] = POLICIES if compare_policies else ("mixed" if own == "auto" else own,)
    if virtual:
        if asked.repeat > 1 or asked.options["tp"] * asked.options["pp"] > 1:
            raise ConfigError("--virtual is one process, and the same every time: leave --repeat, --tp and --pp out")
        result = _virtual(asked, arrivals, policies, objectives)
    else:
        result = _real(asked, arrivals, policies, objectives, warmup)
    finish(result, asked.json_file)


def with_rate(asked: Asked, arrivals: Arrivals) -> tuple[Asked, Arrivals]:
    """A rate of 1/s where neither a rate nor a trace says when to send, and requests to fill the duration."""
    traffic, timed = asked.traffic, asked.traffic.timed
    if not timed and arrivals.rate is None:
        arrivals = replace(arrivals, rate=1.0)
    arrivals.check(timed=timed)
    if not timed and traffic.num_requests is None:
        enough = arrivals.requests_needed() or (DEFAULT_REQUESTS if traffic.trace else None)
        traffic = replace(traffic, num_requests=enough)
    return replace(asked, traffic=traffic), arrivals


def _real(
    asked: Asked, arrivals: Arrivals, policies: tuple[PolicyName, ...], objectives: Objectives, warmup: int
) -> dict[str, Any]:
    from foretell.async_llm import AsyncLLM
    from foretell.benchmark import online_report

    llm = AsyncLLM(asked.model, **asked.engine_options())
    try:
        vocab_size, encode = llm.llm.spec.vocab_size, encoder(llm.llm.tokenizer)
        return online_report.run(
            llm,
            _timed(asked.traffic, arrivals, vocab_size, encode),
            policies=policies,
            objectives=objectives,
            repeat=asked.repeat,
            warmup=warmup,
            say=print,
            progress=sys.stderr.isatty(),
        )
    finally:
        llm.close()


def _virtual(
    asked: Asked, arrivals: Arrivals, policies: tuple[PolicyName, ...], objectives: Objectives
) -> dict[str, Any]:
    from foretell.assembly import EngineOptions
    from foretell.benchmark import online_report
    from foretell.benchmark.setup import virtual_subject

    subject = virtual_subject(EngineOptions(model=asked.model, **asked.engine_options()))
    workload = _timed(asked.traffic, arrivals, subject.spec.vocab_size, None)
    return online_report.run_virtual(subject, workload, policies=policies, objectives=objectives, say=print)


def _timed(traffic: Traffic, arrivals: Arrivals, vocab_size: int, encode: Encode | None) -> Workload:
    return arrivals.apply(traffic.build(vocab_size, encode), traffic.seed)


def encoder(tokenizer: Tokenizer | None) -> Encode | None:
    """Text → token ids, for traces that hold text; None when the model has no tokenizer."""
    return None if tokenizer is None else lambda text: tokenizer.encode(text, add_special_tokens=False)


def _rounded(value: Any) -> Any:
    """Floats to six digits: more are noise, and a line that is read by people too should not be made of it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def finish(result: dict[str, Any], json_file: Path | None, more: dict[str, Any] | None = None) -> None:
    """The JSON line, last on stdout, and in a file when one was named, there with ``more``."""
    line = json.dumps(_rounded(result), allow_nan=False)
    print(f"\n{line}")
    if json_file is not None:
        if more is not None:
            line = json.dumps(_rounded(result) | more, allow_nan=False)
        try:
            json_file.write_text(line + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {json_file}: {error.strerror}") from None
