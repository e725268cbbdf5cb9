"""The pictures of `inspect`: every head is drawn over the K/V head it reads, nothing is wider than the terminal."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foretell.cli.drawing import bar, head_rows, layer_row, plot, shown_kv_heads
from foretell.cli.inspect_view import show
from foretell.inspection import inspect_model
from foretell.store import resolve
from tests.unit.test_inspect_numbers import GEMMA_270M, LLAMA_8B, SMOLLM2

HEADS = [(1, 1), (4, 4), (4, 1), (9, 3), (32, 8), (32, 32), (64, 8), (16, 1), (48, 8), (71, 1), (12, 2)]


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("width", [40, 68, 108])
def test_each_query_head_stands_over_the_kv_head_it_reads(heads: int, kv_heads: int, width: int) -> None:
    group, seen_kv = heads // kv_heads, 0
    for queries, links, kv in head_rows(heads, kv_heads, width):
        assert max(map(len, (queries, links, kv))) <= width
        spans = [match.span() for match in re.finditer(r"└[─┴┬┼]*┘|│", links)]
        assert len(spans) == len(kv.split())
        for start, end in spans:
            number = seen_kv
            above = {int(m[0]) for m in re.finditer(r"\d+", queries) if start < m.end() <= end}
            below = {int(m[0]) for m in re.finditer(r"\d+", kv) if m.start() < end and start < m.end()}
            assert below == {number}
            assert above <= set(range(number * group, (number + 1) * group))
            assert {number * group, (number + 1) * group - 1} <= above
            seen_kv += 1
    assert seen_kv == shown_kv_heads(heads, kv_heads, width)
    assert seen_kv == kv_heads or seen_kv >= 3


def test_nothing_is_elided_where_there_is_room() -> None:
    ((queries, links, kv),) = head_rows(9, 3, 68)
    assert queries == "0 1 2  3 4 5  6 7 8"
    assert links == "└─┼─┘  └─┼─┘  └─┼─┘"
    assert kv == "  0      1      2"


def test_bars_and_plots_are_proportional() -> None:
    assert [bar(share, 10) for share in (0.0, 0.5, 1.0, 2.0)] == ["", "█" * 5, "█" * 10, "█" * 10]
    assert bar(1e-9, 10) == "▏"
    lines = plot([0.0, 4.0, 8.0, 24.0], 24.0, 3)
    assert lines == ["   █", "   █", " ▄██"]
    assert layer_row([None, 512, None]) == "█░█"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("config", [LLAMA_8B, SMOLLM2, GEMMA_270M])
def test_the_picture_fits_and_tells_the_truth(tmp_path: Path, config: dict[str, Any], width: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspection = inspect_model(resolve(str(tmp_path)))
    out = StringIO()
    show(Console(file=out, width=width, highlight=False), inspection)
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert f"{inspection.counts.total:,}" in text
    assert inspection.spec.attention_kind in text
    if width >= 80:  # narrower, numbers may lose their end
        assert f"{inspection.crossover_tokens:,}" in text
        assert "…" not in text
    assert ("sliding layers" in text) == (config is GEMMA_270M)
