"""What an engine of a given profile will do, in three figures."""

from __future__ import annotations

from foretell.config import SchedulerConfig
from foretell.cost.floor import ChunkShape
from foretell.cost.grid import BeyondProfileError
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost

KEYS = 512  # a conversation of middling length


def rates_foretold(profile: Profile, config: SchedulerConfig) -> dict[str, float]:
    """Seconds per token of one sequence and of each of ``max_num_seqs``, after ``KEYS`` tokens; prompt tokens per
    second in a full step. Empty where the profile does not reach."""
    cost, past = StepCost(profile), min(KEYS, config.max_model_len - 1)
    chunk = min(config.max_num_batched_tokens, config.max_model_len)
    try:
        return {
            "tpot_alone_seconds": cost.estimate([ChunkShape(past, 1)]).seconds,
            "tpot_full_seconds": cost.estimate([ChunkShape(past, 1)] * config.max_num_seqs).seconds,
            "prompt_tokens_per_second": chunk / cost.estimate([ChunkShape(0, chunk)]).seconds,
        }
    except BeyondProfileError:
        return {}
