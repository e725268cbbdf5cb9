"""`foretell bench scaling`: one workload over several layouts; speed-up, efficiency, and what travels meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foretell.benchmark import offline
from foretell.benchmark.tables import number, table
from foretell.cpus import usable_cpus
from foretell.errors import ConfigError
from foretell.parallel.layout import Layout, make_layout
from foretell.parallel.volume import volume
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.config import ModelSpec
    from foretell.llm import LLM

Say = Callable[[str], None]


@dataclass(slots=True)
class Row:
    """One layout's figures; walls in seconds, of all rounds."""

    layout: Layout
    walls: list[float] = field(default_factory=list)
    first_walls: list[float] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return statistics.median(self.walls)


def parse_layouts(text: str) -> list[tuple[int, int]]:
    """ "1x1,2x1,1x2" → [(1, 1), (2, 1), (1, 2)]: tp x pp."""
    found = []
    for word in text.split(","):
        tp, _, pp = word.strip().partition("x")
        if not (tp.isdigit() and (pp or "1").isdigit() and int(tp) and int(pp or 1)):
            raise ConfigError(f"layouts are written TPxPP, as in 1x1,2x1,1x2; {word.strip()!r} is none")
        found.append((int(tp), int(pp or 1)))
    return found


def device_for(layouts: Sequence[tuple[int, int]], wanted: str) -> str:
    """One kind of device for all layouts: GPUs where there is one for each rank of the largest."""
    if wanted != "auto":
        return wanted
    import torch

    most = max(tp * pp for tp, pp in layouts)
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= most else "cpu"


def run(
    layouts: Sequence[tuple[int, int]],
    open_llm: Callable[[int, int], LLM],
    spec: ModelSpec,
    build: Callable[[], Workload],
    *,
    rounds: int,
    device: str,
    say: Say,
) -> dict[str, Any]:
    """Every layout once a round, in alternating order; impossible ones are refused before the first starts."""
    rows = {each: Row(make_layout(spec, *each)) for each in layouts}
    workload = build()
    output_len = offline.common_output_len(workload, 1 << 30)
    element_bytes = 4 if device == "cpu" else 2
    for line in theory_lines(spec, list(rows.values()), workload, element_bytes):
        say(line)
    most, cpus = max(row.layout.num_ranks for row in rows.values()), usable_cpus()
    if device == "cpu" and most > cpus:
        say(f"note: {most} processes share {cpus} CPUs here, so no speed-up is to be expected from as many")
    for number_ in range(rounds):
        order = list(rows) if number_ % 2 == 0 else list(rows)[::-1]
        for each in order:
            with open_llm(*each) as llm:
                measured = offline.measure(llm, workload, output_len, repeat=1, warmup=1, progress=False)
            rows[each].walls.append(measured.walls.full)
            if measured.walls.first is not None:
                rows[each].first_walls.append(measured.walls.first)
            say(f"round {number_ + 1}: tp={each[0]} pp={each[1]} {number(measured.walls.full)} s")
    say("")
    say(report(list(rows.values()), workload, output_len))
    return {
        "bench": "scaling",
        "workload": workload.name,
        "rounds": rounds,
        "layouts": [_as_dict(spec, row, workload, output_len, element_bytes) for row in rows.values()],
    }


def theory_lines(spec: ModelSpec, rows: Sequence[Row], workload: Workload, element_bytes: int = 4) -> list[str]:
    """The communication volume of a decode step of all requests, and of the whole workload."""
    count = len(workload.requests)
    found = []
    for row in rows:
        step = volume(spec, row.layout, count, count, element_bytes)
        tokens = workload.prompt_tokens + workload.output_tokens
        whole = volume(spec, row.layout, tokens, workload.output_tokens, element_bytes)
        kilobytes, megabytes = step.bytes_per_rank(row.layout) / 1e3, whole.bytes_per_rank(row.layout) / 1e6
        layout = f"tp={row.layout.tp} pp={row.layout.pp}"
        found.append((layout, step.sums, step.sends, number(kilobytes), number(megabytes)))
    header = ("a rank sends", "sums/step", "sends/step", "kB/decode step", "MB in all")
    return [f"workload {workload.name}: {workload.description}", table(header, found), ""]


def report(rows: Sequence[Row], workload: Workload, output_len: int | None) -> str:
    base = rows[0]
    lines = []
    for row in rows:
        ranks, speed_up = row.layout.num_ranks, base.wall / row.wall
        efficiency = speed_up * base.layout.num_ranks / ranks
        step = ms_per_step(row, output_len)
        lines.append(
            (
                f"tp={row.layout.tp} pp={row.layout.pp}", ranks, number(row.wall),
                number(workload.output_tokens / row.wall), number(step), f"{speed_up:.2f}",
                f"{100 * efficiency:.0f} %",
            )
        )  # fmt: skip
    return table(("", "ranks", "wall, s", "output tok/s", "ms/decode step", "speed-up", "efficiency"), lines)


def ms_per_step(row: Row, output_len: int | None) -> float | None:
    if output_len is None or not row.first_walls:
        return None
    return 1e3 * (row.wall - statistics.median(row.first_walls)) / (output_len - 1)


def _as_dict(
    spec: ModelSpec, row: Row, workload: Workload, output_len: int | None, element_bytes: int
) -> dict[str, Any]:
    count = len(workload.requests)
    step = volume(spec, row.layout, count, count, element_bytes)
    return {
        "tp": row.layout.tp,
        "pp": row.layout.pp,
        "wall_seconds": row.wall,
        "walls_seconds": row.walls,
        "output_tokens_per_second": workload.output_tokens / row.wall,
        "ms_per_decode_step": ms_per_step(row, output_len),
        "sums_per_step": step.sums,
        "sent_bytes_per_rank_and_decode_step": step.bytes_per_rank(row.layout),
    }
