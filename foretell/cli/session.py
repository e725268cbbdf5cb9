"""What `run` and `chat` share: opening a model with something to look at meanwhile, and safe text output."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from foretell.core.params import SamplingParams
from foretell.errors import ForetellError, InvalidRequestError

if TYPE_CHECKING:
    from foretell.llm import LLM
    from foretell.output import CompletionOutput


def open_model(model: str, **options: Any) -> LLM:
    """The model, ready to serve; on a terminal, downloads and loading show a bar.

    Options are checked before anything is fetched, and files are fetched before torch is imported: what cannot
    work says so at once. ``assembly.phases`` has the seconds of every phase, fetching included in "resolve".
    """
    from foretell.assembly import EngineOptions
    from foretell.store import resolve

    EngineOptions(model=model, **options)
    started = time.perf_counter()
    resolve(model, offline=options.get("offline"))
    fetching = time.perf_counter() - started
    with _bar(f"loading {model}") as report:
        from foretell.llm import LLM

        llm = LLM(model, on_load=report, **options)
    phases = llm.assembly.phases
    phases["resolve"] = phases.get("resolve", 0.0) + fetching
    return llm


def _bar(title: str) -> Any:
    if not sys.stderr.isatty():
        return nullcontext()
    from foretell.progress import loading_bar

    return loading_bar(title)


class TextOut:
    """Generated text on stdout, flushed piece by piece.

    What a model writes is not to be trusted: on a terminal its control characters, which could rewrite the
    screen or the clipboard, are shown instead of obeyed.
    """

    def __init__(self) -> None:
        self.on_terminal = sys.stdout.isatty()
        self.ends_line = True
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without UTF-8 must not end the answer

    def write(self, text: str) -> None:
        if not text:
            return
        self.ends_line = text.endswith("\n")
        sys.stdout.write(visible(text) if self.on_terminal else text)
        sys.stdout.flush()

    def end_line(self) -> None:
        """Start a fresh line unless one has just begun."""
        if not self.ends_line:
            self.write("\n")


def visible(text: str) -> str:
    """``text`` with control characters other than newline and tab spelled out: ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not _is_control(c) else f"\\x{ord(c):02x}" for c in text)


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character <= "\x9f"


def check_finished(completion: CompletionOutput) -> None:
    """A request that failed while it ran is an error of the command."""
    if completion.error is not None:
        raise ForetellError(completion.error)


def read_stdin() -> str:
    """All of stdin as text. InvalidRequestError unless it is UTF-8."""
    return as_utf8(sys.stdin.buffer.read(), "stdin")


def as_utf8(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{source} is not valid UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): convert it first"
        ) from None


def sampling(**wanted: Any) -> SamplingParams:
    """SamplingParams with the options that were given; None keeps its default."""
    return SamplingParams(**{name: value for name, value in wanted.items() if value is not None})
