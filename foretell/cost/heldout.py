"""Steps that no point of the grid was made for: half of them fit the profile, the other half say how good it is."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foretell.cost.floor import ChunkShape
from foretell.cost.pace import Pace
from foretell.cost.profile import Kind, Profile
from foretell.cost.refit import fitted_scales
from foretell.cost.step import Estimate, StepCost
from foretell.cost.stepping import Shape, StepBench

if TYPE_CHECKING:
    from foretell.llm import LLM

LONGEST = 4096
MOST_SECONDS = 80.0  # spent on steps held out
FEWEST_OF_A_KIND = 8  # for an interval of their own


def random_shapes(llm: LLM, count: int, most_seqs: int, seed: int = 1) -> Iterator[Shape]:
    """Decodes of random pasts, prompt chunks, and both together, as an engine meets them."""
    rng = random.Random(seed)
    config, longest = llm.assembly.engine.scheduler.config, min(llm.assembly.max_model_len - 1, LONGEST)
    most = min(config.max_num_seqs - 1, most_seqs)
    for number in range(count):
        running = rng.randrange(1, most + 1) if number % 3 != 1 and most > 1 else 0
        reach = rng.randrange(32, longest)
        shape = [ChunkShape(rng.randrange(1, reach), 1) for _ in range(running)]
        if number % 3 or not shape:
            widest = min(1024, config.max_num_batched_tokens, longest) - running
            length = round(math.exp(rng.uniform(math.log(min(8, widest)), math.log(widest))))
            shape.append(ChunkShape(rng.choice((0, rng.randrange(longest - length + 1))), length, rng.random() < 0.5))
        yield tuple(shape)


def with_held_out(
    llm: LLM, profile: Profile, count: int, most_seqs: int, report: Callable[[int, str], None]
) -> Profile:
    """The profile fitted to every other one of ``count`` random steps, with the errors of the rest."""
    bench, cost = StepBench(llm), StepCost(profile)
    pace = Pace(bench, profile.reference_seconds)
    found: list[tuple[Shape, Estimate, float, float]] = []

    def run(engine: object) -> None:
        begun = time.monotonic()
        for number, shape in enumerate(random_shapes(llm, count, most_seqs)):
            if time.monotonic() - begun > MOST_SECONDS:
                break
            report(number, "steps held out")
            look = pace.look()
            if (times := bench.with_launching(shape)) is not None:
                own, wall = (pace.steady(seconds, look) for seconds in times)
                found.append((shape, cost.estimate(shape), own, wall))

    llm.service.call(run).result()
    # the device's own seconds: what launching took says nothing of the components
    scales = fitted_scales([(replace(estimate, least=0.0), own) for _, estimate, own, _ in found[::2]])
    fitted = scales.applied(profile)
    return judged(fitted, [(shape, wall) for shape, _, _, wall in found[1::2]])


def judged(profile: Profile, steps: Sequence[tuple[Shape, float]]) -> Profile:
    """With intervals and errors from measured steps (without the host's seconds) that it was not fitted to."""
    cost = StepCost(profile)
    held_out: list[dict[str, Any]] = []
    ratios: dict[Kind, list[float]] = {"decode": [], "prefill": []}
    for shape, seconds in steps:
        estimate = cost.estimate(shape)
        ratios[estimate.kind].append(seconds / estimate.device)
        held_out.append({
            "kind": estimate.kind, "tokens": sum(c.length for c in shape), "sequences": len(shape),
            "predicted": estimate.device, "measured": seconds,
        })  # fmt: skip
    every = sorted(ratio for own in ratios.values() for ratio in own)
    if not every:
        return profile
    low, high = interval_of(every)
    return replace(
        profile,
        low=low,
        high=high,
        intervals={kind: interval_of(sorted(own)) for kind, own in ratios.items() if len(own) >= FEWEST_OF_A_KIND},
        median_error=statistics.median(abs(1 - 1 / ratio) for ratio in every),
        held_out=held_out,
    )


def interval_of(ordered: Sequence[float]) -> tuple[float, float]:
    """Between which multiples nine of ten further steps should lie, by order statistics (Vovk et al. 2005, conformal
    prediction); the extremes where the sample is too small for less. Never without 1."""
    outside = max(1, int(0.05 * (len(ordered) + 1)))
    return min(1.0, ordered[outside - 1]), max(1.0, ordered[-outside])
