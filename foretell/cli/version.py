"""``foretell version``: what is installed, for a bug report."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import typer

import foretell

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "gguf", "huggingface_hub")


def show_version() -> None:
    """Versions of foretell, Python and the packages it computes with.

    [bold]Example[/bold]

      foretell version
    """
    typer.echo(f"foretell {foretell.__version__}")
    typer.echo(f"python {platform.python_version()} on {sys.platform} {platform.machine()}")
    for package in PACKAGES:  # from their metadata: none is imported
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} is not installed")


def version_option(wanted: bool) -> None:
    """``--version``: the first line alone."""
    if wanted:
        typer.echo(f"foretell {foretell.__version__}")
        raise typer.Exit
