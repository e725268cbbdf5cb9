"""Pictures out of characters: which head reads which, layers in a row, bars, and small plots. Plain strings."""

from __future__ import annotations

from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BAR = " ▏▎▍▌▋▊▉█"
FULL_LAYER, SLIDING_LAYER = "█", "░"
MAX_ROWS = 4


def head_rows(num_heads: int, num_kv_heads: int, width: int) -> list[tuple[str, str, str]]:
    """Query heads over the K/V head they read, as rows of (queries, connectors, K/V heads) within ``width``.

    Too many groups for ``MAX_ROWS`` rows are cut; a group that is too wide loses its middle.
    """
    group = num_heads // num_kv_heads
    digits = len(str(num_heads - 1))
    labels = [str(n).rjust(digits) for n in range(num_heads)]
    groups = [_group(labels[i * group : (i + 1) * group], str(i), width) for i in range(num_kv_heads)]
    span = len(groups[0][0]) + 2
    per_row = max(1, (width + 2) // span)
    rows = [groups[i : i + per_row] for i in range(0, len(groups), per_row)]
    return [_joined(row) for row in rows[:MAX_ROWS]]


def shown_kv_heads(num_heads: int, num_kv_heads: int, width: int) -> int:
    """How many K/V heads ``head_rows`` has room for."""
    group = num_heads // num_kv_heads
    digits = len(str(num_heads - 1))
    span = min(width, group * (digits + 1) - 1) + 2
    return min(num_kv_heads, MAX_ROWS * max(1, (width + 2) // span))


def _joined(groups: Sequence[tuple[str, str, str]]) -> tuple[str, str, str]:
    queries, links, heads = ("  ".join(parts).rstrip() for parts in zip(*groups, strict=True))
    return queries, links, heads


def _group(labels: list[str], kv_label: str, width: int) -> tuple[str, str, str]:
    """One K/V head and the query heads above it, three lines of one width."""
    room = max(3, (width + 1) // (len(labels[0]) + 1))
    if len(labels) > room:
        labels = [*labels[: room - 2], "…".rjust(len(labels[0])), labels[-1]]
    queries = " ".join(labels)
    ends = [(len(labels[0]) + 1) * i + len(labels[0]) - 1 for i in range(len(labels))]
    middle = (ends[0] + ends[-1]) // 2
    if len(labels) == 1:
        return queries, "│".rjust(len(queries)), kv_label.rjust(len(queries))
    line = [" "] * ends[0] + ["─"] * (ends[-1] - ends[0] + 1)
    for end in ends:
        line[end] = "┴"
    line[ends[0]], line[ends[-1]] = "└", "┘"
    line[middle] = "┼" if middle in ends else "┬"
    kv = kv_label.rjust(middle + 1) if len(kv_label) < 3 else " " * max(0, middle - 1) + kv_label
    return queries, "".join(line), kv.ljust(len(queries))


def layer_row(windows: Sequence[int | None]) -> str:
    """One character per layer: █ sees the whole context, ░ a sliding window."""
    return "".join(FULL_LAYER if window is None else SLIDING_LAYER for window in windows)


def bar(share: float, width: int) -> str:
    """A bar of ``share`` of ``width``, to an eighth of a character; something always shows for more than nothing."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + (_BAR[eighths % 8] if eighths % 8 else "")


def plot(values: Sequence[float], top: float, height: int) -> list[str]:
    """Columns of blocks, ``height`` lines high for a value of ``top``; the first line is the highest."""
    levels = [round(max(0.0, min(1.0, value / top if top else 0.0)) * height * 8) for value in values]
    levels = [max(1, level) if value > 0 else level for level, value in zip(levels, values, strict=True)]
    return [
        "".join(_EIGHTHS[max(0, min(8, level - 8 * line))] for level in levels) for line in reversed(range(height))
    ]
