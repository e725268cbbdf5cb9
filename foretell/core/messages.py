"""What passes between the brain and an executor, and from the brain to whoever asked: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from foretell.core.counters import Progress
from foretell.core.params import SamplingParams


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start+length) of a request, to be computed in one step.

    The worker has the tokens already: those it was given when the request was added, and those it
    sampled itself. ``new_block_ids`` has one tuple per KV group; -1 stands for a block that lies
    outside the group's window and holds nothing.
    """

    request_id: int
    start: int
    length: int
    new_block_ids: tuple[tuple[int, ...], ...]
    sample: bool


@dataclass(slots=True)
class Added:
    """A request as a worker must know it from now on (again after a preemption)."""

    request_id: int
    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # those sampled before a preemption


@dataclass(slots=True)
class Batch:
    """One step's work. ``removed`` is applied before ``added``, and both before the chunks."""

    id: int
    chunks: list[Chunk]
    added: list[Added] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(slots=True, frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token's own, its rank (1 = most likely), and the top k."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class ChunkResult:
    """What one chunk yielded: a sampled token where asked, or the error that ended this request alone.

    ``ended``: the token completes the form its output must have, nothing may follow. ``embedding``: the pooled
    hidden state of a request that asked for it; it has ended then.
    """

    request_id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    ended: bool = False
    embedding: list[float] | None = None


@dataclass(slots=True)
class Result:
    """A finished batch; times are the executor's clock, in seconds. ``parts`` splits them by component."""

    batch_id: int
    results: list[ChunkResult]
    started: float
    finished: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Output:
    """News of one request. ``finish_reason`` is None while it runs: then "stop", "length", "abort" or "error"."""

    request_id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_token: int | None = None  # the token id that stopped it, if one did
    error: str | None = None
    embedding: list[float] | None = None
    progress: Progress | None = None  # with the first token, the first after a preemption, and the last


@dataclass(slots=True)
class Turn:
    """What one call of ``schedule`` decided, for records and for the twin test."""

    turn: int
    batch: Batch
    preempted: list[tuple[int, str]] = field(default_factory=list)
