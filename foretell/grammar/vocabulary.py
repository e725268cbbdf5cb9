"""A model's tokens as llguidance sees them: bytes by id, and how text is spelled with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from foretell.store import Tokenizer

_MARK: Final = "\x02"  # never merges with what follows; keeps "add a space in front" off the text itself
_SPECIAL_BYTE: Final = b"\xff"  # llguidance's mark of special tokens; no part of UTF-8


class Vocabulary:
    """What llguidance asks of a tokenizer. ``tokens`` has ``vocab_size`` + 1 entries: ids that no token has are
    empty, and never allowed; the last, which the model does not have, stands for the end where there is no end
    token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_ids = sorted(i for i in end_ids if i < vocab_size) or [vocab_size]
        self.eos_token_id = self.end_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        known = min(vocab_size, tokenizer.vocab_size)
        tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (vocab_size - known)
        self.tokens = [b"" if token == _SPECIAL_BYTE else token for token in tokens] + [b"<end>"]
        special = {i for i in tokenizer.special_ids if i < vocab_size}
        self.special_token_ids = sorted(special | set(self.end_ids) | {vocab_size})
        self._prefix = tokenizer.encode(_MARK, add_special_tokens=False)
        self._by_bytes: dict[bytes, int] = {}
        self._longest = 0

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids whose bytes are ``text``: the tokenizer's own spelling where it has one, else longest first."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        wanted = text.encode("utf-8", "replace")
        for ids in (self._plain(text), self._marked(text)):
            if all(i < self.vocab_size for i in ids) and b"".join([self.tokens[i] for i in ids]) == wanted:
                return ids
        return self._greedy(wanted)

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _marked(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(_MARK + text, add_special_tokens=False)
        count = len(self._prefix)
        return ids[count:] if ids[:count] == self._prefix else []

    def _greedy(self, wanted: bytes) -> list[int]:
        if not self._by_bytes:
            special = set(self.special_token_ids)
            self._by_bytes = {t: i for i, t in enumerate(self.tokens) if t and i not in special}
            self._longest = max(map(len, self._by_bytes), default=0)
        ids, at = [], 0
        while at < len(wanted):
            for end in range(min(len(wanted), at + self._longest), at, -1):
                if (found := self._by_bytes.get(wanted[at:end])) is not None:
                    ids.append(found)
                    at = end
                    break
            else:  # bytes that no token spells
                return ids
        return ids


def build_vocabulary(tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
    """0.3 s for 49,000 tokens, 2 s for 262,000. ``vocab_size``: the model's; ``end_ids``: what ends an output."""
    from llguidance import LLTokenizer
    from llguidance import TokenizerWrapper as Wrapper

    vocabulary: Any = Vocabulary(tokenizer, vocab_size, end_ids)
    return LLTokenizer(Wrapper(vocabulary), n_vocab=vocab_size + 1, eos_token=vocabulary.end_ids)
