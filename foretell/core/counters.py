"""What a scheduler has done since it was made: plain sums, for metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Tokens, but for preemptions. A prompt counts when its first token comes; the prefix cache is asked at every
    admission, after a preemption too."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: dict[str, int] = field(default_factory=dict)  # by reason
    peak_running: int = 0  # most requests that ever ran at once


@dataclass(slots=True, frozen=True)
class Progress:
    """How a request has fared so far; seconds on the executor's clock."""

    first_scheduled: float
    cached_tokens: int  # of its prompt, taken from the prefix cache at the last admission
    preemptions: int
