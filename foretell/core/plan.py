"""A batch in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from foretell.core.messages import Added, Chunk


@dataclass(slots=True)
class Plan:
    """What is left of the step's budget (tokens) and sequences, and who may not join it any more."""

    budget: int
    max_seqs: int
    chunks: list[Chunk] = field(default_factory=list)
    added: list[Added] = field(default_factory=list)
    prefill: bool | None = None  # phase of the first request planned
    blocked_from: tuple[int, int] | None = None  # a request of this key waits for blocks: none behind it goes
    admission_closed: bool = False

    @property
    def full(self) -> bool:
        return self.budget <= 0 or len(self.chunks) >= self.max_seqs
