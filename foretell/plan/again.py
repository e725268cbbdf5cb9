"""A plan that is being served, planned again: its machine has turned out slower, or faster, than the profile said.

The engine's live check (cost.watch) follows the drift and keeps what it found as a profile beside the calibration.
From there on this is a process of its own, so that the server goes on serving: ``python -m foretell.plan.again PLAN
PROFILE`` says in one line whether another configuration is better now.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from foretell.cost.grid import BeyondProfileError
from foretell.cost.named import refitted_path
from foretell.errors import ConfigError, ForetellError
from foretell.plan.command import PlanAsked, default_path, make_plan, make_problem
from foretell.plan.evaluate import Outcome, evaluate
from foretell.plan.memory import ledger
from foretell.plan.plan import Plan, load, save
from foretell.plan.problem import Problem
from foretell.plan.space import Candidate

LOOK_SECONDS = 10.0  # between two looks at the engine's figures
NICENESS = 19  # the engine goes first
MOST = 64  # configurations simulated


def asked_of(data: Mapping[str, Any], profile: Path) -> PlanAsked:
    """What the plan was asked, to be answered by another profile. ConfigError if it does not say."""
    asked = data.get("asked")
    if not isinstance(asked, dict):
        raise ConfigError("the plan does not say what it was made for: make it again with foretell plan")
    most = min(asked["most"] or MOST, MOST)
    return replace(PlanAsked.from_dict(asked), profiles=(str(profile),), most=most)


def again(data: Mapping[str, Any], profile: Path) -> tuple[Plan | None, str]:
    """The new plan if it is better than what is being served, and how the two do, in words."""
    asked = asked_of(data, profile)
    problem = make_problem(asked)
    fields = {name: data["winner"][name] for name in Candidate.__slots__}
    served = Candidate(**{**fields, "weights": next(iter(problem.profiles))})
    now = _outcome(problem, served)
    made = make_plan(asked)
    if made.winner is None:
        return None, "no configuration can be run by what steps take now"
    best, chosen = made.found.outcomes[made.winner], made.found.candidates[made.winner]
    if now is None:
        return made, f"by what steps take now another plan is needed: {chosen}; {best.goodput:.3g}/s of goodput"
    if chosen == served or not better(made, now):
        return (
            None,
            f"the plan stands: by what steps take now {now.goodput:.3g}/s of goodput, none does better",
        )
    told = f"{now.goodput:.3g}/s of goodput as it is served, {best.goodput:.3g}/s with it"
    return made, f"a better plan, by what steps take now: {chosen}; {told}"


def _outcome(problem: Problem, candidate: Candidate) -> Outcome | None:
    held = ledger(problem, candidate)
    try:
        return None if isinstance(held, str) else evaluate(problem, candidate, held.num_blocks)
    except BeyondProfileError:
        return None


def better(plan: Plan, now: Outcome) -> bool:
    """Whether the plan's winner is worth a restart: more goodput, or limits kept that are broken now."""
    best = plan.found.outcomes[plan.winner if plan.winner is not None else plan.order[0]]
    kept, broken = plan.goal.ratio(best.latencies) <= 1, plan.goal.ratio(now.latencies) > 1
    return best.goodput > 1.01 * now.goodput or (kept and broken)


def again_path(model: str) -> Path:
    """Where the better plan is kept."""
    return default_path(model).with_suffix(".again.json")


class PlanWatch(threading.Thread):
    """Looks at the engine's figures now and then; once they say that the profile is wrong, plans again."""

    def __init__(self, plan: Path, profile_of: str, figures: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__(name="plan-watch", daemon=True)
        self.plan, self.profile, self.figures = plan, refitted_path(profile_of), figures
        self.ended = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        while not self.ended.wait(LOOK_SECONDS):
            if self.look():
                return

    def look(self) -> bool:
        """Whether the plan had to be made again; it is being made then."""
        prediction = self.figures().get("prediction") or {}
        if not prediction.get("wrong") or not self.profile.is_file():
            return False
        command = [sys.executable, "-m", "foretell.plan.again", str(self.plan), str(self.profile)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return True

    def end(self) -> None:
        """Stop looking, and planning."""
        self.ended.set()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def main(plan: str, profile: str) -> int:
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        data = load(Path(plan))
        made, words = again(data, Path(profile))
        if made is not None:
            path = again_path(data["model"])
            save(made.as_dict(), path)
            words += f" (foretell serve --plan {path})"
    except ForetellError as error:
        words = f"planning again: {error}"
    print(words, file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
