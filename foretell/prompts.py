"""Prompts and parameters as callers give them → what the engine takes, with every check that needs the model."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from operator import index
from random import Random
from typing import TYPE_CHECKING, Any

from foretell.core.params import SamplingParams
from foretell.errors import InvalidRequestError

if TYPE_CHECKING:
    from foretell.store import Tokenizer

Prompt = str | Sequence[int]


class PromptPreparer:
    """Tokenises, checks ids against the vocabulary, and completes sampling parameters for one model."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int], seed: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(sorted(eos_token_ids))
        self._seeds = Random(seed)

    def token_ids(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequestError for an empty prompt, ids outside the vocabulary, text without a tokenizer, and
        what is neither text nor ids."""
        _check_kind(prompt)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("this model has no tokenizer: give the prompt as a list of token ids")
            ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            if (plain := self._plain_ids(prompt)) is not None:
                return plain
            ids = [int(i) if _is_index(i) else _bad_id(i) for i in prompt]
        if not ids:
            raise InvalidRequestError("the prompt is empty: send at least one token")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            worst = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidRequestError(f"token id {worst} is outside the vocabulary of {self.vocab_size}")
        return ids

    def _plain_ids(self, prompt: Sequence[int]) -> list[int] | None:
        """The ids of a list that is what it should be, in few passes, as prompts are long; None: look closer."""
        if not isinstance(prompt, (list, tuple)):
            return None
        import numpy as np

        try:
            if type(sum(prompt)) is not int:  # so is the sum if all are, though True and False are 1 and 0 to it
                return None
            seen = np.frombuffer(
                struct.pack(f"{len(prompt)}q", *prompt), np.int64
            )  # half the time of numpy's own way
        except (TypeError, struct.error):
            return None
        if len(seen) == 0 or seen.min() < 2 or seen.max() >= self.vocab_size:
            return None
        return list(prompt)

    def params(self, params: SamplingParams) -> SamplingParams:
        """The same, with the model's end tokens, bad words as ids, and a seed of its own if it has none."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"params must be SamplingParams, got {type(params).__name__}")
        for name in ("allowed_token_ids", "stop_token_ids"):
            for token_id in getattr(params, name) or ():
                if token_id >= self.vocab_size:
                    raise InvalidRequestError(f"{name}: {token_id} is outside the vocabulary of {self.vocab_size}")
        for token_id in params.logit_bias:
            if token_id >= self.vocab_size:
                raise InvalidRequestError(f"logit_bias: {token_id} is outside the vocabulary of {self.vocab_size}")
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise InvalidRequestError("stop strings and bad_words need a tokenizer: use stop_token_ids or logit_bias")
        changes: dict[str, Any] = {"eos_token_ids": tuple(params.eos_token_ids) or self.eos_token_ids}
        if params.seed is None:
            changes["seed"] = self._seeds.getrandbits(63)
        if params.bad_words:
            changes["bad_token_ids"] = (*params.bad_token_ids, *self._bad_ids(params.bad_words))
        return replace(params, **changes)

    def _bad_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as it tokenises at the start of a text and after a space."""
        assert self.tokenizer is not None
        found = {
            tuple(self.tokenizer.encode(form, add_special_tokens=False))
            for word in words
            for form in (word, " " + word.lstrip())
        }
        return [list(ids) for ids in sorted(found) if ids]


def _is_index(value: object) -> bool:
    """Whether it is one whole number, also of numpy or torch; a row of them is not."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
        return False
    try:
        index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _bad_id(value: object) -> int:
    raise InvalidRequestError(f"a prompt is text or a list of token ids, got an element {value!r}")


def _check_kind(prompt: object) -> None:
    """Bytes, mappings and sets can be gone through as well, and would give some other prompt."""
    if isinstance(prompt, (bytes, bytearray, memoryview, Mapping, Set)) or not hasattr(prompt, "__iter__"):
        raise InvalidRequestError(f"a prompt is text or a list of token ids, got {type(prompt).__name__}")


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as a list. A flat list of integers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    _check_kind(prompts)
    items: list[Any] = list(prompts)
    if items and all(_is_index(item) for item in items):
        return [items]
    return items


def with_plain_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message, its content as text where it came in OpenAI's parts. InvalidRequestError where one is no text."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidRequestError("this model reads text only: every content part is {'type': 'text', 'text': …}")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
