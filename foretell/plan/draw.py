"""A plan as pictures: where the time of each choice goes, and how goodput stands against latency."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from foretell.cli.drawing import bar
from foretell.loadgen.plot import BLUE, GREY, ORANGE, RED, STYLE, Panel
from foretell.plan.evaluate import TERMS, Outcome
from foretell.plan.goals import measure_name
from foretell.plan.plan import Plan
from foretell.plan.words import differing

SIGNS = {"weights": "W", "compute": "C", "KV reads": "K", "collectives": "L", "CPU": "H", "queue": "Q"}
COLORS = {
    "weights": BLUE, "compute": ORANGE, "KV reads": "#15803d", "collectives": "#7c3aed", "CPU": GREY, "queue": RED,
}  # fmt: skip
WIDTH, ROW, LEFT = 960, 22, 240


def rows(plan: Plan) -> list[tuple[str, Outcome]]:
    """The winner, then the best with each other value of each choice."""
    if plan.winner is None:
        return []
    found = [("the winner", plan.found.outcomes[plan.winner])]
    return found + [(f"{name} {value}", plan.found.outcomes[i]) for name, value, i in differing(plan)]


def plots(plan: Plan, width: int = 50) -> list[str]:
    """For a terminal: each row's time by bound, and its goodput."""
    shown = rows(plan)
    if not shown:
        return []
    label = max(len(name) for name, _ in shown)
    top = max(outcome.goodput for _, outcome in shown) or 1.0
    key = ", ".join(f"{sign} {term}" for term, sign in SIGNS.items())
    lines = [f"a request's time: {key}"]
    lines += [f"{name.ljust(label)}  {letters(outcome, width)}" for name, outcome in shown]
    lines += ["", "goodput"]
    lines += [f"{name.ljust(label)}  {bar(o.goodput / top, width)} {o.goodput:.3g}/s" for name, o in shown]
    return lines


def letters(outcome: Outcome, width: int) -> str:
    """A row of letters in proportion to the terms: the widest gets what rounding leaves."""
    counts = {term: int(outcome.terms[term] * width) for term in TERMS}
    counts[outcome.bound] += width - sum(counts.values())
    return "".join(SIGNS[term] * counts[term] for term in TERMS)


def picture(plan: Plan) -> str:
    """An SVG: every simulated configuration by its first latency and its goodput, and the rows of ``plots``."""
    shown = rows(plan)
    outcomes = list(plan.found.outcomes.values())
    height = 330 + ROW * len(shown)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"><style>{STYLE}</style>']
    if outcomes:
        parts.append(_scatter(plan, outcomes))
    for number, (name, outcome) in enumerate(shown):
        parts.append(_terms_row(name, outcome, 300 + ROW * number))
    for number, term in enumerate(TERMS):
        x = LEFT + number * 110
        parts.append(f'<rect x="{x}" y="272" width="10" height="10" fill="{COLORS[term]}"/>')
        parts.append(f'<text class="small" x="{x + 14}" y="281">{term}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _scatter(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    metric, percent = plan.goal.measures[0]
    finite = [o for o in outcomes if o.latencies[0] < float("inf")]
    points = [(o.latencies[0] * 1e3, o.goodput) for o in finite]
    x_max = max((x for x, _ in points), default=1.0) * 1.05 or 1.0
    y_max = max((y for _, y in points), default=1.0) * 1.1 or 1.0
    name = f"{measure_name(metric, percent)}, ms"
    panel = Panel("goodput, requests/s, of everything simulated", name, 60, 30, WIDTH - 100, 200, x_max, y_max)
    panel.dots(points, GREY)
    front = [(plan.found.outcomes[i].latencies[0] * 1e3, plan.found.outcomes[i].goodput) for i in plan.pareto]
    panel.dots(front, BLUE, 3.0)
    if plan.winner is not None:
        won = plan.found.outcomes[plan.winner]
        panel.dots([(won.latencies[0] * 1e3, won.goodput)], RED, 5.0)
    for limit in plan.goal.limits[:1]:
        panel.upright(limit.seconds * 1e3, "limit", RED, 0.9)
    return panel.svg()


def _terms_row(name: str, outcome: Outcome, y: float) -> str:
    parts = [f'<text class="small" text-anchor="end" x="{LEFT - 8}" y="{y + 12}">{escape(name)}</text>']
    x, width = float(LEFT), WIDTH - LEFT - 140
    for term in TERMS:
        part = outcome.terms[term] * width
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{part:.1f}" height="15" fill="{COLORS[term]}"/>')
        x += part
    words = f"{outcome.goodput:.3g}/s, {outcome.bound}"
    parts.append(f'<text class="small" x="{LEFT + width + 8}" y="{y + 12}">{escape(words)}</text>')
    return "".join(parts)
