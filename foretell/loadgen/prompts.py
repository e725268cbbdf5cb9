"""Prompts of wanted lengths for a server whose tokenizer may be unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foretell.trace.synthetic import synthetic_tokens
from foretell.trace.workloads import TraceRequest, Workload

if TYPE_CHECKING:
    from foretell.store import Tokenizer

# Each of these, with the space before it, is one token in nearly every vocabulary for English.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have had from they which "
    "or you all were her she there would their we him been has when who will more no if out so said what up "
    "its about into than them can only other new some could time these two may then do first any my now such "
    "like our over man me even most made after also did many before must through back years where much your "
    "way well down should because each just those people how too little state good very make world still own "
    "see men work long get here between both life being under never day same another know while last might us "
    "great old year off come since against go came right used take three "
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Prompts for a workload's requests: the trace's own text or token ids where they can be used, else words.

    With a ``tokenizer`` lengths are exact and prompts are sent as token ids where the interface takes them.
    Without, a prompt is a run of common words, as many as ``tokens_per_word`` and ``overhead_tokens`` (a start
    token, a chat template), both measured, say. What prompts share as token ids they share as words. What a trace
    says in words is sent as ``own_variant``; other variants get words of as many tokens.
    """

    workload: Workload
    tokenizer: Tokenizer | None = None
    vocab_size: int = len(WORDS)
    as_ids: bool = False
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    own_variant: int = 0

    def prompt(self, index: int, variant: int = 0) -> str | list[int]:
        """Of request ``index``. Repeats with other variants share nothing with each other."""
        request = self.workload.requests[index]
        if request.prompt_text is not None and variant == self.own_variant:
            if self.as_ids and request.prompt_token_ids is not None:
                return list(request.prompt_token_ids)
            return request.prompt_text.encode("utf-8", "replace").decode()  # JSON files can hold lone surrogates
        if self.tokenizer is None:
            return self.words(request, index, variant)
        ids = self.workload.token_ids(index, self.vocab_size, variant=variant)
        return ids if self.as_ids else self.tokenizer.decode(ids, skip_special_tokens=False)

    def words(self, request: TraceRequest, index: int, variant: int = 0) -> str:
        count = max(1, round((request.prompt_len - self.overhead_tokens) / self.tokens_per_word))
        scale = count / request.prompt_len
        block = max(1, round(request.block_tokens * scale))
        stand_in = TraceRequest(count, 1, block_hashes=request.block_hashes, block_tokens=block)
        return spoken(synthetic_tokens(stand_in, index, len(WORDS), variant))


def spoken(ids: Sequence[int]) -> str:
    return " ".join([WORDS[token] for token in ids])
