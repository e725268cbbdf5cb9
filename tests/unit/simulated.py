"""Prompts of requests that have something to do with each other, for simulations."""

from __future__ import annotations

import random

from foretell.executor.virtual import synthetic_token


def related_prompts(rng: random.Random, count: int, longest: int) -> dict[int, list[int]]:
    """By request: token ids, fewer than ``longest``; beginnings are shared, and answers repeated."""
    prompts = {i: [rng.randrange(50) for _ in range(rng.randrange(1, 40))] for i in range(count)}
    for i in range(1, count):
        if rng.random() < 0.5:  # a shared beginning
            prompts[i] = prompts[i - 1][: rng.randrange(1, 40)] + prompts[i]
        elif rng.random() < 0.5:  # the next turn of a conversation: with what was answered before
            answer = [synthetic_token(i - 1, n) for n in range(rng.randrange(1, 40))]
            prompts[i] = (prompts[i - 1] + answer + prompts[i])[: longest - 1]
    return prompts
