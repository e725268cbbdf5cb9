"""``foretell inspect``: a model's architecture, memory and work per token, without loading its weights."""

from __future__ import annotations

from typing import Annotated

import typer

from foretell.cli import options as o
from foretell.store.aliases import DEFAULT_MODEL


def inspect(
    model: o.Model = DEFAULT_MODEL,
    dtype: Annotated[o.DtypeName, typer.Option(help="Number format that memory is reckoned in.")] = "auto",
    json_output: o.JsonOutput = False,
    offline: o.Offline = False,
) -> None:
    """What a model is and what it costs, from its config.json or GGUF header: no weights are loaded.

    Which query heads read which K/V head, exact parameter counts beside the rule of thumb, memory for any
    context and batch, and how the work of attention grows with the context while that of the MLP does not.

    [bold]Examples[/bold]

      foretell inspect
      foretell inspect gemma3-270m
      foretell inspect ./folder-with-only-a-config.json --dtype float16
      foretell inspect smollm2-135m --json | jq .kv_cache.bytes_per_token
    """
    from foretell.inspection import as_dict, inspect_model
    from foretell.store import resolve

    inspection = inspect_model(resolve(model, offline=offline or None), dtype)
    if json_output:
        import json

        print(json.dumps(as_dict(inspection), ensure_ascii=False))
        return
    from rich.console import Console

    from foretell.cli.inspect_view import show

    show(Console(highlight=False), inspection)
