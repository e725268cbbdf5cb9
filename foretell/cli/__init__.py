"""The command line: ``foretell run``, ``chat``, ``models``, ``inspect``, …

One module per command. Nothing here imports torch or reads a model before a command needs it, so that
``foretell --help`` and every usage error answer at once.
"""

from __future__ import annotations


def main() -> None:
    """The console script."""
    import sys

    try:
        from foretell.cli.app import app

        app(prog_name="foretell")
    except KeyboardInterrupt:  # before a command could guard itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)
