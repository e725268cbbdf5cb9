"""Log-probabilities in the three shapes that clients know: chat's, the legacy completions', vLLM's for prompts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foretell.core.messages import TokenLogprobs

if TYPE_CHECKING:
    from foretell.store import Tokenizer

_LOWEST = -9999.0  # stands for minus infinity, which JSON has no word for


def finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # NaN as well


class TokenNames:
    """Token ids as clients see them: text where they are text, and their bytes."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids or tokenizer is None
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def text(self, token_id: int) -> str:
        return self.both(token_id)[0]

    def bytes(self, token_id: int) -> bytes:
        return bytes(self.both(token_id)[1] or ())

    def both(self, token_id: int) -> tuple[str, list[int] | None]:
        found = self._known.get(token_id)
        if found is None:
            raw = None if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
            text = f"token_id:{token_id}" if self._as_ids or raw is None else raw.decode("utf-8", "backslashreplace")
            found = self._known[token_id] = (text, None if raw is None else list(raw))
        return found


def chat_logprobs(entries: Sequence[TokenLogprobs], top: int, names: TokenNames) -> dict[str, Any]:
    """OpenAI's ChoiceLogprobs for the chat endpoint."""
    content = []
    for entry in entries:
        likeliest = [_named(token_id, logprob, names) for token_id, logprob in entry.top[:top]]
        content.append({**_named(entry.token_id, entry.logprob, names), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def _named(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    text, raw = names.both(token_id)
    return {"token": text, "logprob": finite(logprob), "bytes": raw}


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], names: TokenNames) -> list[dict[str, Any] | None]:
    """As vLLM has them: per prompt token, {token id: figures} of the token itself and of the likeliest."""
    return [None if entry is None else _ranked(entry, names) for entry in entries]


def _ranked(entry: TokenLogprobs, names: TokenNames) -> dict[str, Any]:
    ranks = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)}
    ranks[entry.token_id] = (entry.logprob, entry.rank)
    return {
        str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": names.text(token_id)}
        for token_id, (logprob, rank) in ranks.items()
    }


class LegacyLogprobs:
    """The completions endpoint's lists. One per output, for offsets count characters from the output's beginning."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The next tokens; an entry is None for the first token of an echoed prompt, which nothing predicts."""
        made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            made["tokens"].append(self._names.text(token_id))
            made["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            made["top_logprobs"].append(None if entry is None else self._top(entry))
            made["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._names.bytes(token_id)))
        return made

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(self._names.text(token_id), finite(logprob))
        return found
