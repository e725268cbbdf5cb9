"""``foretell run-batch``: a file of requests in, a file of answers out."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli import options as o
from foretell.cli.groups import grouped
from foretell.cli.guard import say
from foretell.errors import ConfigError, UnavailableError
from foretell.store.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from foretell.llm import LLM
    from foretell.server.batch import Tally

_FILES = "Files"
MAX_LINE_BYTES = 4 << 20


@grouped
def run_batch(
    engine: o.Engine,
    input_file: Annotated[
        Path, typer.Option("--input-file", "-i", help="Requests, one JSON object per line.", rich_help_panel=_FILES)
    ],
    output_file: Annotated[
        Path,
        typer.Option(
            "--output-file",
            "-o",
            help="Answers in the same order; what it holds already is not computed again.",
            rich_help_panel=_FILES,
        ),
    ],
    model: o.Model = DEFAULT_MODEL,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over, whatever the output holds.", rich_help_panel=_FILES)
    ] = False,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that the file uses for the model; may be repeated.")
    ] = None,
) -> None:
    """Answer an OpenAI batch file: chat, responses, completions and embeddings, as fast as the engine goes.

    Each line is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}. A line that cannot be
    answered gets its error in its own place. Interrupted, the same command goes on where it stopped.

    [bold]Examples[/bold]

      foretell run-batch -i requests.jsonl -o answers.jsonl
      foretell run-batch -i requests.jsonl -o answers.jsonl gemma3-270m --served-model-name gpt-4o-mini
    """
    _check(input_file, output_file)
    from foretell.cli.session import open_model

    with open_model(model, **engine.options()) as llm:
        names = tuple(served_model_name or ()) or (model,)
        _answer(llm, input_file, output_file, overwrite, names)


def _check(source: Path, target: Path) -> None:
    """ConfigError before a model is loaded."""
    if not source.is_file():
        raise ConfigError(f"there is no input file {source}")
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"the output file {target} cannot be written: its folder is missing, or it is a folder")
    if target.exists() and target.samefile(source):
        raise ConfigError("input and output are the same file: name another output file")


def _answer(llm: LLM, source: Path, target: Path, overwrite: bool, names: tuple[str, ...]) -> None:
    import asyncio

    from foretell.async_llm import AsyncLLM
    from foretell.progress import generation_bar
    from foretell.server.app import create_app
    from foretell.server.batch import Tally, lines_of, run_batch
    from foretell.server.config import ServerConfig
    from foretell.server.local_engine import LocalTextEngine

    concurrency = 2 * llm.assembly.engine.scheduler.config.max_num_seqs  # the next ones wait at the engine's door
    config = ServerConfig(served_model_names=names, max_body_bytes=MAX_LINE_BYTES, default_timeout_seconds=None)
    engine = LocalTextEngine(AsyncLLM.over(llm), max_queue=concurrency * config.max_outputs)
    with source.open("rb") as stream:
        total = sum(1 for _ in lines_of(stream, MAX_LINE_BYTES))
    tally, started = Tally(), time.monotonic()
    try:
        with generation_bar(total) if sys.stderr.isatty() else nullcontext(_nothing) as advance:

            def resumed(lines: int) -> None:
                for _ in range(lines):
                    advance(0)
                if lines:
                    say(f"{lines} of {total} lines are answered already")

            asyncio.run(
                run_batch(
                    create_app(engine, config), source, target, concurrency=concurrency, max_bytes=MAX_LINE_BYTES,
                    overwrite=overwrite, advance=advance, on_resume=resumed, tally=tally,
                )
            )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: {error.strerror}") from None
    except (KeyboardInterrupt, UnavailableError):
        _report(tally, total, time.monotonic() - started)
        say("run the same command again to go on")
        raise
    _report(tally, total, time.monotonic() - started)


def _nothing(tokens: int) -> None:
    """In place of a bar where nobody sees one."""


def _report(tally: Tally, total: int, seconds: float) -> None:
    failed = "".join(f"; {count} × {kind}" for kind, count in tally.errors.most_common())
    say(
        f"{tally.skipped + tally.done} of {total} lines answered, {tally.done} now in {seconds:.1f} s{failed}; "
        f"{tally.prompt_tokens:,} prompt and {tally.output_tokens:,} output tokens, "
        f"{tally.output_tokens / max(seconds, 1e-9):,.0f} output tok/s"
    )
