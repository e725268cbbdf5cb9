"""Log-probabilities of a prompt's own tokens, gathered chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foretell.core.messages import Chunk
from foretell.worker.sampler import token_logprobs
from foretell.worker.state import RequestState

if TYPE_CHECKING:
    from foretell.model.transformer import Transformer

PROMPT_LOGPROB_ROWS = 128  # positions whose full logits are held at once


def gather_prompt_logprobs(model: Transformer, state: RequestState, chunk: Chunk, hidden: torch.Tensor) -> None:
    """The hidden state at position p predicts token p + 1; hidden [chunk.length, h]."""
    last = min(chunk.length, state.prompt_len - 1 - chunk.start)
    for begin in range(0, last, PROMPT_LOGPROB_ROWS):
        stop = min(begin + PROMPT_LOGPROB_ROWS, last)
        logits = model.logits(hidden[begin:stop])
        first = chunk.start + begin + 1
        targets = torch.from_numpy(state.tokens[first : first + stop - begin].copy()).to(logits.device)
        state.prompt_logprobs += token_logprobs(logits, targets, [state.params.prompt_logprobs or 0] * len(targets))
