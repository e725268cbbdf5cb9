"""``foretell chat``: a conversation on the terminal, or scripted through stdin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from foretell.cli import options as o
from foretell.cli.chat_commands import run_command
from foretell.cli.chat_session import ChatSession
from foretell.cli.groups import grouped
from foretell.cli.guard import say
from foretell.cli.session import as_utf8, open_model
from foretell.store.aliases import DEFAULT_MODEL

HISTORY_LINES = 1000


@dataclass(frozen=True)
class ChatSampling(o.Sampling):
    max_tokens: o.MaxTokens = 512


@grouped
def chat(
    choosing: ChatSampling,
    engine: o.Engine,
    model: o.Model = DEFAULT_MODEL,
    system: o.System = None,
) -> None:
    """Talk with a model. Answers stream; each turn says how fast it was and how much the prefix cache saved.

    Ctrl-C stops an answer, Ctrl-D leaves, a backslash at the end of a line continues it, /help lists the
    commands.

    [bold]Examples[/bold]

      foretell chat
      foretell chat --system "You answer in rhymes." --temperature 0.7
      printf 'Hi, I am Ada.\\nWhat is my name?\\n' | foretell chat
    """
    choosing.params()  # what cannot work is refused before anything is loaded
    with open_model(model, **engine.options()) as llm:
        session = ChatSession(llm, choosing.given(), system)
        session.check_model()
        if sys.stdin.isatty():
            say(f"{llm.assembly.files.name}, {llm.assembly.max_model_len:,} tokens of context. /help; Ctrl-D leaves.")
        with _line_history():
            converse(session, read_lines())


def converse(session: ChatSession, lines: Iterator[str]) -> None:
    """Until the lines end or one says /quit."""
    for line in lines:
        if line.startswith("/"):
            if not run_command(session, line):
                return
        elif line.strip():
            session.ask(line)


def read_lines() -> Iterator[str]:
    """What the user enters, a message at a time; lines that end in a backslash go on."""
    source = _typed_lines() if sys.stdin.isatty() else _piped_lines()
    parts: list[str] = []
    for line in source:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts.clear()
    if parts:
        yield "\n".join(parts)


def _typed_lines() -> Iterator[str]:
    continued = False
    while True:
        try:
            line = input("… " if continued else "\n> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /quit leaves)")
            continue
        continued = line.endswith("\\")
        yield line


def _piped_lines() -> Iterator[str]:
    for number, data in enumerate(sys.stdin.buffer, 1):
        yield as_utf8(data.rstrip(b"\r\n"), f"stdin, line {number},")


@contextmanager
def _line_history() -> Iterator[None]:
    """Arrow keys and earlier prompts, kept between sessions, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    from foretell.store.cache import cache_home

    file = cache_home() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # what was asked is nobody else's business
            readline.set_history_length(HISTORY_LINES)
            readline.write_history_file(file)
