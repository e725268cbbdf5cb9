"""What a changed model says beside the original: perplexity and KL divergence of its next tokens, on real text."""

from __future__ import annotations

import math
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foretell.store import load_tokenizer, resolve

AT_ONCE = 1024  # positions compared at a time: a vocabulary of float32 each


@dataclass(frozen=True)
class Divergence:
    tokens: int
    perplexity: float
    kl: float  # nats a token, of the original's distribution from this one
    kl_p99: float
    same_top: float  # share of positions with the same likeliest token

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:8.3f}  KL {self.kl:.6f} (p99 {self.kl_p99:.5f})  "
            f"same likeliest {100 * self.same_top:6.2f} %"
        )


def windows_of(model: str, text: Path | None, count: int, length: int) -> list[list[int]]:
    """So many stretches of the text, each of ``length`` tokens; Python's own documentation if no text is given."""
    topics = pydoc_data.topics.topics
    words = text.read_text() if text else "\n\n".join(topics[key] for key in sorted(topics))
    tokenizer = load_tokenizer(resolve(model))
    assert tokenizer is not None, "this needs a model with a tokenizer"
    ids = tokenizer.encode(words[: count * length * 8])
    assert len(ids) >= count * length, f"the text has {len(ids)} tokens, {count * length} are needed"
    return [list(ids[at : at + length]) for at in range(0, count * length, length)]


def divergence(base: Tensor, found: Tensor, windows: list[list[int]]) -> Divergence:
    """``base`` and ``found``: log-probabilities [windows · (length - 1), vocab] of what follows each token."""
    kl, own, same = [], [], []
    following = torch.tensor([window[1:] for window in windows]).reshape(-1, 1).to(found.device)
    parts = zip(base.split(AT_ONCE), found.split(AT_ONCE), following.split(AT_ONCE), strict=True)
    for expected, said, token in parts:
        kl.append((expected.exp() * (expected - said)).sum(-1).double())
        own.append(said.gather(1, token).double())
        same.append(expected.argmax(-1) == said.argmax(-1))
    every = torch.cat(kl)
    perplexity = math.exp(-float(torch.cat(own).mean()))
    agreeing = float(torch.cat(same).double().mean())
    return Divergence(len(every), perplexity, float(every.mean()), float(every.quantile(0.99)), agreeing)
