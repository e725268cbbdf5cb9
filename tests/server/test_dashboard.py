"""The Grafana dashboard asks for nothing that /metrics does not give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.server.client import client_for, run

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "foretell.json"
METRIC = re.compile(r"\b(?:foretell:|process_)\w+")
LABELS = re.compile(r"\bby \(([^)]*)\)|\{(\w+)[=!]|\{\{(\w+)\}\}")


def queries() -> list[tuple[str, str]]:
    """Title and expression of every panel's query."""
    board = json.loads(DASHBOARD.read_text())
    return [(p["title"], t["expr"] + t["legendFormat"]) for p in board["panels"] for t in p.get("targets", ())]


def served_samples(engine: Any) -> dict[str, set[str]]:
    """Sample name → label names, after two requests."""

    async def go() -> str:
        async with client_for(engine) as client:
            for prompt in ("hello", "again"):
                await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3, "ignore_eos": True})
            return (await client.get("/metrics")).text

    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(run(go())):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
        samples.setdefault(f"{family.name}_total", set())  # a counter by reason that has had no reason yet
    return samples


def test_every_metric_and_label_on_the_dashboard_is_served(tiny: Any) -> None:
    samples = served_samples(tiny)
    asked = queries()
    assert len(asked) >= 30
    for title, query in asked:
        names = METRIC.findall(query)
        assert names, title
        assert set(names) <= set(samples), (title, query)
        allowed = set().union(*(samples[name] for name in names)) | {"instance", "model_name", "reason"}
        labels = {label.strip() for groups in LABELS.findall(query) for label in ",".join(groups).split(",")} - {""}
        assert labels <= allowed, (title, query)


def test_every_metric_of_ours_is_on_the_dashboard(tiny: Any) -> None:
    shown = " ".join(query for _, query in queries())
    ours = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in served_samples(tiny)}
    ours = {name.removesuffix("_created") for name in ours if name.startswith("foretell:")}
    assert len(ours) > 15
    assert not {name for name in ours if name not in shown}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }  # fmt: skip
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
