"""What a worker keeps of each request: its tokens, its block tables, and what sampling has to remember."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

import numpy as np

from foretell.core.messages import Added, ChunkResult, TokenLogprobs
from foretell.core.params import SamplingParams

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from foretell.grammar.compiler import GrammarCompiler
    from foretell.grammar.matcher import FormMatcher


Choice = Literal["likeliest", "drawn", "on_cpu"]


def _choice(params: SamplingParams) -> Choice:
    """How a device gets the request's tokens: from the logits alone, with a draw, or from the CPU's sampler."""
    if params.reshapes_logits or params.logprobs is not None:
        return "on_cpu"
    return "drawn" if params.temperature > 0 and params.pooling is None else "likeliest"


class RequestState:
    """Rebuilt from an ``Added`` after a preemption: nothing here cannot be derived from the tokens."""

    def __init__(self, added: Added, num_groups: int, grammars: GrammarCompiler | None = None) -> None:
        """``grammars``: where the requests' forms are compiled; they are ready when a request arrives here."""
        self.id = added.request_id
        self.params = added.params
        self.choice = _choice(added.params)
        self.prompt_len = len(added.prompt_token_ids)
        known = [*added.prompt_token_ids, *added.output_token_ids]
        self.num_tokens = len(known)
        self.tokens: NDArray[np.int64] = np.empty(max(64, 2 * len(known)), dtype=np.int64)
        self.tokens[: len(known)] = np.frombuffer(struct.pack(f"{len(known)}q", *known), np.int64)  # as in prompts.py
        self.tables: list[NDArray[np.int32]] = [np.zeros(8, dtype=np.int32) for _ in range(num_groups)]
        self.num_blocks = [0] * num_groups
        # prompt log-probabilities gathered so far, one per prompt token from the second on
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs_due = self.params.prompt_logprobs is not None and not added.output_token_ids
        self.form: FormMatcher | None = None  # what the output must look like
        self.form_error = ""  # why it cannot be followed
        if self.params.structured is not None:
            self._open_form(added, grammars)
        self.pooled: Tensor | None = None  # [h] float64 on the CPU: of the prompt's hidden states so far
        self._seen: SeenTokens | None = None  # made when a penalty first asks
        self._bias: tuple[Tensor, Tensor] | None = None
        self._allowed: Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def output_ids(self) -> NDArray[np.int64]:
        return self.tokens[self.prompt_len : self.num_tokens]

    def append(self, token_id: int) -> None:
        if self.num_tokens == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1
        if self._seen is not None:
            self._seen.add_output(token_id)

    def take(self, result: ChunkResult) -> None:
        """Append a sampled token, and tell whether it completes the form of the output."""
        if result.token_id is None:
            return
        self.append(result.token_id)
        if self.form is not None:
            self.form.accept(result.token_id)
            result.ended = self.form.ended

    def _open_form(self, added: Added, grammars: GrammarCompiler | None) -> None:
        if grammars is None or self.params.structured is None:
            self.form_error = "structured output is not available in this engine"
            return
        try:
            self.form = grammars.matcher(self.params.structured, added.output_token_ids)
        except Exception as error:  # whatever it is, this request fails alone
            self.form_error = str(error) or type(error).__name__

    def seen_tokens(self) -> SeenTokens:
        """For penalties; kept up to date by ``append``."""
        if self._seen is None:
            self._seen = SeenTokens(self.tokens[: self.prompt_len], self.output_ids)
        return self._seen

    def bias_tensors(self, vocab: int) -> tuple[Tensor, Tensor]:
        """logit_bias as ids [B] and values [B]."""
        import torch

        if self._bias is None:
            known = {token: bias for token, bias in self.params.logit_bias.items() if token < vocab}
            self._bias = (
                torch.tensor(list(known), dtype=torch.int64),
                torch.tensor(list(known.values()), dtype=torch.float32),
            )
        return self._bias

    def allowed_tensor(self, vocab: int) -> Tensor:
        """allowed_token_ids [A]."""
        import torch

        if self._allowed is None:
            allowed = [t for t in self.params.allowed_token_ids or () if t < vocab]
            self._allowed = torch.tensor(allowed, dtype=torch.int64)
        return self._allowed

    def add_blocks(self, group: int, block_ids: tuple[int, ...]) -> None:
        """Append to a group's block table; dropped blocks (-1) are never read, any valid id will do."""
        have, need = self.num_blocks[group], self.num_blocks[group] + len(block_ids)
        table = self.tables[group]
        if need > len(table):
            table = np.concatenate([table, np.zeros(max(need, len(table)), dtype=np.int32)])
            self.tables[group] = table
        table[have:need] = [max(0, b) for b in block_ids]
        self.num_blocks[group] = need


class SeenTokens:
    """The different tokens of a prompt and its output, and how often each came in the output."""

    def __init__(self, prompt: NDArray[np.int64], outputs: NDArray[np.int64]) -> None:
        ids, places = np.unique(np.concatenate([prompt, outputs]), return_inverse=True)
        self._ids = ids
        self._counts = np.bincount(places[len(prompt) :], minlength=len(ids)).astype(np.float32)
        self._place_of = {token: place for place, token in enumerate(ids.tolist())}

    def __len__(self) -> int:
        return len(self._place_of)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self)]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self)]

    def add_output(self, token_id: int) -> None:
        place = self._place_of.setdefault(token_id, len(self))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token_id
        self._counts[place] += 1
