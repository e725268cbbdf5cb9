"""The picture that ``foretell inspect`` draws, section by section."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foretell.cli import units
from foretell.cli.drawing import FULL_LAYER, SLIDING_LAYER, bar, head_rows, layer_row, shown_kv_heads
from foretell.cli.inspect_work import show_work
from foretell.config import ModelSpec
from foretell.inspection import Inspection
from foretell.inspection.examine import BATCH_SIZES, DTYPE_BYTES

MAX_WIDTH = 110

_KINDS = {
    "MHA": "multi-head attention: every query head has keys and values of its own",
    "GQA": "grouped-query attention: {group} query heads share one K/V head",
    "MQA": "multi-query attention: all {heads} query heads share one K/V head",
}


def show(console: Console, inspection: Inspection) -> None:
    """The whole picture, on ``console``."""
    if console.width > MAX_WIDTH:
        console.width = MAX_WIDTH
    _show_shape(console, inspection)
    _show_heads(console, inspection.spec)
    _show_layers(console, inspection.spec)
    _show_parameters(console, inspection)
    _show_memory(console, inspection)
    show_work(console, inspection)


def _heading(console: Console, title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}[/bold]", align="left", style="dim")


def _show_shape(console: Console, inspection: Inspection) -> None:
    spec, counts = inspection.spec, inspection.counts
    console.print(
        f"[bold cyan]{escape(inspection.name)}[/]  {spec.family}, {units.count(counts.total)} parameters, "
        f"{spec.attention_kind}, context {units.tokens(spec.max_position_embeddings)}"
    )
    console.print(f"[dim]{escape(inspection.path)}[/]", overflow="fold")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for name, value, meaning in _shape_lines(spec):
        table.add_row(name, value, meaning)
    console.print(Padding(table, (1, 0, 0, 0)))


def _shape_lines(spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
    kind = f"{'gated ' if spec.gated_mlp else ''}MLP with {spec.activation}"
    tied = "the head is the embedding, read again" if spec.tied_embeddings else "embedding and head are two tables"
    yield "depth L", f"{spec.num_layers}", f"blocks, each {_block(spec)}"
    yield "width h", f"{spec.hidden_size:,}", "numbers stand for one token between blocks"
    yield "heads H × D", f"{spec.num_heads} × {spec.head_dim}", f"query heads of {spec.head_dim} numbers"
    yield "K/V heads", f"{spec.num_kv_heads} × {spec.head_dim}", "are kept in the cache; queries are not"
    yield "ffn", f"{spec.intermediate_size:,}", f"{kind}: {spec.intermediate_size / spec.hidden_size:.2f}·h"
    yield "vocabulary", f"{spec.vocab_size:,}", f"tokens; {tied}"
    yield "positions", *_positions(spec)


def _block(spec: ModelSpec) -> str:
    halves = "attention and MLP side by side" if spec.parallel_block else "attention, then MLP"
    return f"{halves} ({spec.norm_placement}-norm, {'RMS' if spec.norm == 'rms' else 'layer'} norm)"


def _positions(spec: ModelSpec) -> tuple[str, str]:
    if spec.rope is None:
        return f"{spec.learned_positions:,}", "learned vectors, one per position"
    scaling = "" if spec.rope.scaling == "none" else f", stretched ×{spec.rope.factor:g} ({spec.rope.scaling})"
    part = "" if spec.rope.dim == spec.head_dim else f" of {spec.rope.dim} of {spec.head_dim} numbers"
    local = f"; {spec.local_rope.theta:,.0f} in sliding layers" if spec.local_rope else ""
    return "rotary", f"angles{part}, base {spec.rope.theta:,.0f}{local}{scaling}"


def _show_heads(console: Console, spec: ModelSpec) -> None:
    _heading(console, f"attention: {spec.attention_kind}")
    group = spec.query_heads_per_kv_head
    saved = f"; the KV cache is 1/{group} of MHA's" if group > 1 else ""
    console.print(_KINDS[spec.attention_kind].format(group=group, heads=spec.num_heads) + saved)
    console.print()
    width = console.width - 12
    for number, (queries, links, heads) in enumerate(head_rows(spec.num_heads, spec.num_kv_heads, width)):
        if number:
            console.print()
        console.print(Text.assemble(("query heads ", "dim"), (queries, "cyan")))
        console.print(Text.assemble((" " * 12, ""), (links, "dim")))
        console.print(Text.assemble(("K/V heads   ", "dim"), (heads, "bold green")))
    left = spec.num_kv_heads - shown_kv_heads(spec.num_heads, spec.num_kv_heads, width)
    if left:
        console.print(f"[dim]            … and so on for {left} more K/V heads[/]")


def _show_layers(console: Console, spec: ModelSpec) -> None:
    _heading(console, "layers")
    row = layer_row(spec.windows)
    width = console.width - 12
    for start in range(0, len(row), width):
        console.print(Text.assemble((f"{start:>10}  ", "dim"), (row[start : start + width], "magenta")))
    windows = sorted({window for window in spec.windows if window is not None})
    sliding = sum(window is not None for window in spec.windows)
    legend = f"{FULL_LAYER} {spec.num_layers - sliding} layers see the whole context"
    if sliding:
        sizes = " or ".join(f"{window:,}" for window in windows)
        legend += f"   {SLIDING_LAYER} {sliding} see the last {sizes} tokens only"
    console.print(f"            {legend}")


def _show_parameters(console: Console, inspection: Inspection) -> None:
    counts, estimate, spec = inspection.counts, inspection.estimate, inspection.spec
    _heading(console, f"parameters: {counts.total:,}")
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("component", style="cyan", no_wrap=True)
    for column in ("each", "×", "all", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", style="green", no_wrap=True)
    width = max(8, min(30, console.width - 62))
    for name, each, times in _parameter_rows(inspection):
        part = each * times / counts.total
        table.add_row(
            name, f"{each:,}", f"{times}", f"{each * times:,}", units.share(part, 1), bar(part, width)
        )  # fmt: skip
    console.print(table)
    rule, layers = estimate.twelve_h_squared, counts.per_layer * counts.num_layers
    console.print(
        f"\n[bold]rule of thumb[/] 12·h²·L = 12·{spec.hidden_size:,}²·{spec.num_layers} = {units.count(rule)} "
        f"without embeddings; the layers really have {units.count(layers)} ({layers / rule:.2f} ×). "
        "Width counts squared, depth once."
    )
    matrices = 3 if spec.gated_mlp else 2
    console.print(
        f"[bold]closer[/] a layer is 2·h·q + 2·h·kv = {units.count(estimate.attention_per_layer)} for attention "
        f"(q = H·D = {spec.num_heads * spec.head_dim:,}, kv = {spec.num_kv_heads * spec.head_dim:,}) and "
        f"{matrices}·h·ffn = {units.count(estimate.mlp_per_layer)} for the MLP. With the embeddings "
        f"{estimate.total:,}: all but {units.share(counts.total - estimate.total, counts.total)} (norms and biases)."
    )


def _parameter_rows(inspection: Inspection) -> Iterator[tuple[str, int, int]]:
    """(component, parameters of one, how many of them)."""
    counts = inspection.counts
    tied = " (also the head)" if inspection.spec.tied_embeddings else ""
    yield f"embedding{tied}", counts.embedding, 1
    if counts.positions:
        yield "positions", counts.positions, 1
    for name, size in counts.layer.items():
        yield name.replace(".", " "), size, counts.num_layers
    yield "final norm", counts.final_norm, 1
    if counts.head:
        yield "head", counts.head, 1


def _show_memory(console: Console, inspection: Inspection) -> None:
    _heading(console, "memory")
    weights = "   ".join(
        f"{name} [bold]{units.binary_bytes(inspection.counts.total * size)}[/]" for name, size in DTYPE_BYTES.items()
    )
    console.print(f"weights     {weights}")
    if inspection.stored:
        kinds = ", ".join(
            f"{kind.tensors} {'tensors' if kind.tensors > 1 else 'tensor'} in {kind.type} "
            f"({kind.bits_per_parameter:.1f} bits)"
            for kind in inspection.stored
        )
        stored = units.binary_bytes(sum(kind.bytes for kind in inspection.stored))
        console.print(f"on disk     [bold]{stored}[/]: {kinds}")
    _print_kv_formula(console, inspection)
    table = Table(
        title=f"weights + KV cache, all in {inspection.dtype}",
        title_justify="left",
        title_style="dim",
        box=SIMPLE_HEAD,
    )
    table.add_column("context", justify="right", style="cyan")
    table.add_column("KV of one", justify="right")
    for batch in BATCH_SIZES:
        table.add_column(f"batch {batch}", justify="right")
    for at in inspection.contexts:
        totals = [units.binary_bytes(inspection.memory_bytes(at.context_tokens, batch)) for batch in BATCH_SIZES]
        table.add_row(units.tokens(at.context_tokens), units.binary_bytes(at.kv_bytes), *totals)
    console.print(Padding(table, (1, 0, 0, 0)))


def _print_kv_formula(console: Console, inspection: Inspection) -> None:
    spec, size = inspection.spec, inspection.bytes_per_element
    console.print(
        f"KV cache    2 (K and V) · {spec.num_layers} layers · {spec.num_kv_heads} K/V heads · {spec.head_dim} "
        f"· {size} bytes = [bold]{units.binary_bytes(inspection.kv_bytes_per_token)}[/] per token"
    )
    if any(window is not None for window in spec.windows):
        full = sum(window is None for window in spec.windows)
        late = inspection.kv_bytes_per_token * full // spec.num_layers
        console.print(f"            beyond the window only {full} layers grow: {units.binary_bytes(late)} per token")
