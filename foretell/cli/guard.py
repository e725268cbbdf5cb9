"""How commands end: one line for what the user can mend, the conventional exit codes, no traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec

import typer
from typer.core import TyperGroup

from foretell.errors import ForetellError

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # the last two: 128 + SIGINT, 128 + SIGPIPE
Arguments = ParamSpec("Arguments")
UsageError: Any = typer.BadParameter.__base__  # its public name differs between versions of typer


class Commands(TyperGroup):
    """Commands whose usage errors are one line, as their other errors are, and say where help is."""

    def main(self, *args: Any, **more: Any) -> Any:
        alone, more["standalone_mode"] = more.get("standalone_mode", True), False
        if not alone:
            return super().main(*args, **more)
        try:
            code = super().main(*args, **more)
        except UsageError as error:
            message = (
                error.format_message()
                .replace("Value error, ", "")
                .removeprefix("Invalid value: ")
                .strip()
                .rstrip(".")
            )
            if message:  # none where a command without arguments has shown its help
                command = error.ctx.command_path if error.ctx else "foretell"
                say(f"error: {message[:1].lower()}{message[1:]} ({command} --help shows what there is)")
            sys.exit(USAGE)
        except typer.Abort:
            sys.exit(FAILED)
        sys.exit(code or 0)


def guarded(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The command, with its expected ways to fail turned into one line on stderr and an exit code.

    Other exceptions are bugs of ours and keep their traceback.
    """

    @functools.wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except ForetellError as error:
            fail(str(error))
        except MemoryError:
            fail("out of memory: choose a smaller model, dtype or --kv-cache-bytes")
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has left. Python would try to flush once more on its way out, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None

    return run


def fail(message: str, code: int = FAILED) -> NoReturn:
    """One line on stderr, then the end."""
    say(f"error: {message}")
    raise typer.Exit(code)


def say(message: str) -> None:
    """One line on stderr, whatever ``message`` holds. Nothing if there is nobody to read it."""
    try:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    except OSError:
        return
