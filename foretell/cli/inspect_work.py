"""The part of ``foretell inspect`` about work: operations and bytes per token, and what limits each phase."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foretell.cli import units
from foretell.cli.drawing import plot
from foretell.config import ModelSpec
from foretell.cost.operations import decode_flops, score_flops, visible_keys
from foretell.inspection import Inspection
from foretell.inspection.words import decode_sentence, prefill_sentence

PLOT_LINES = 3


def show_work(console: Console, inspection: Inspection) -> None:
    console.print()
    console.rule("[bold]work per token[/bold]", align="left", style="dim")
    console.print(
        "Attention compares a token with every earlier one: attending (Q·Kᵀ and the weighted sum of V) grows with "
        "the context. The projections to Q, K, V and back, and the MLP, see the token alone: constant work wherever "
        "it stands."
    )
    console.print(Padding(_flops_table(inspection), (1, 0, 0, 0)))
    crossover = inspection.crossover_tokens
    console.print(
        "Attending never costs more than the MLP: the windows see to that."
        if crossover is None
        else f"Attending costs more than the MLP from [bold]{crossover:,}[/] tokens of context on"
        + (", more than this model takes." if crossover > inspection.spec.max_position_embeddings else ".")
    )
    _show_plots(console, inspection)
    console.print(Padding(_bytes_table(inspection), (1, 0, 0, 0)))
    console.print(f"[bold]prefill[/]  {prefill_sentence(inspection.prefill)}")
    console.print(f"[bold]decode[/]   {decode_sentence(inspection.decode, inspection.decode_batched)}")


def _flops_table(inspection: Inspection) -> Table:
    unit = units.shared_flop_unit(at.flops.total for at in inspection.contexts)
    table = Table(
        title=f"{unit.name} to decode one token (a multiply-add is two operations)",
        title_justify="left", title_style="dim", box=SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("context", justify="right", style="cyan")
    table.add_column("attending", justify="right", style="bold")
    for column in ("its share", "projections", "MLP", "head", "total"):
        table.add_column(column, justify="right")
    for at in inspection.contexts:
        flops = at.flops
        fixed = (flops.attention_projections, flops.mlp, flops.head, flops.total)
        table.add_row(
            units.tokens(at.context_tokens),
            unit.show(flops.attention_scores),
            units.share(flops.attention_scores, flops.total),
            *(unit.show(part) for part in fixed),
        )
    return table


def _bytes_table(inspection: Inspection) -> Table:
    unit = units.shared_byte_unit(at.traffic.total for at in inspection.contexts)
    table = Table(
        title=f"{unit.name} read to decode one token ({inspection.dtype}, one sequence)",
        title_justify="left", title_style="dim", box=SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("context", justify="right", style="cyan")
    table.add_column("K and V", justify="right", style="bold")
    for column in ("attention", "MLP", "head", "total", "FLOP per byte"):
        table.add_column(column, justify="right")
    for at in inspection.contexts:
        traffic = at.traffic
        parts = (traffic.kv_read, traffic.attention_weights, traffic.mlp_weights, traffic.head_weights, traffic.total)
        table.add_row(
            units.tokens(at.context_tokens),
            *(unit.show(part) for part in parts),
            f"{at.flops.total / traffic.total:.1f}",
        )
    return table


def _show_plots(console: Console, inspection: Inspection) -> None:
    """Three small plots on one scale: full layers grow, sliding layers flatten, the MLP is flat."""
    spec = inspection.spec
    width = max(16, min(64, console.width - 44))
    longest = spec.max_position_embeddings
    lengths = [max(1, longest * (column + 1) // width) for column in range(width)]
    mlp = float(decode_flops(spec, 1).mlp)
    curves = [
        (name, [float(score_flops(spec, _keys(spec, n, sliding))) for n in lengths]) for name, sliding in _kinds(spec)
    ]
    curves.append(("MLP", [mlp] * width))
    top = max(max(values) for _, values in curves)
    for name, values in curves:
        console.print()
        for number, line in enumerate(plot(values, top, PLOT_LINES)):
            label = name if number == PLOT_LINES - 1 else ""
            level = f" {units.flops(values[-1])}" if number == PLOT_LINES - 1 else ""
            style = "yellow" if name == "MLP" else "cyan"
            console.print(Text.assemble((f"{label:>26} ", "dim"), (line, style), (level, "bold")))
    end = units.tokens(longest)
    console.print(Text(f"{'tokens of context':>26} 1{end.rjust(width - 1)}", style="dim"))


def _kinds(spec: ModelSpec) -> Sequence[tuple[str, bool]]:
    kinds = []
    if any(window is None for window in spec.windows):
        kinds.append(("attention, full layers", False))
    if any(window is not None for window in spec.windows):
        kinds.append(("attention, sliding layers", True))
    return kinds


def _keys(spec: ModelSpec, tokens: int, sliding: bool) -> int:
    """Keys that a token sees in all layers of one kind."""
    return sum(visible_keys(tokens, window) for window in spec.windows if (window is not None) == sliding)
