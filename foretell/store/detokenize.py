"""Token ids to text, as they come: only text that can no longer change, and in sum exactly ``decode(all)``.

A token is bytes rather than characters: a character may be spread over several tokens, and how the rest
of a run looks decides whether a byte is a letter or damage. Each kind of decoder therefore has its own rule
of what is settled.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer as Backend

    from foretell.store.tokenizer import Tokenizer

_SPACE: Final = "▁"
BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a backend turns tokens into text.

    byte-level: a token spells bytes in GPT-2's alphabet. sentencepiece: ▁ is a space, ``<0xHH>`` a byte, and
    ``strip`` leading spaces of the whole text go. metaspace: ▁ is a space, those of the first token go when
    ``strip``. other: anything else, decoded as a whole each time.
    """

    kind: Literal["byte-level", "sentencepiece", "metaspace", "other"]
    strip: int = 0


def decoding_of(backend: Backend) -> Decoding:
    """Reads off the backend's decoder which of the known kinds it is."""
    if backend.decoder is None:
        return Decoding("other")
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding("byte-level")
    if kinds == ["Metaspace"] and steps[0]["replacement"] == _SPACE:
        return Decoding("metaspace", int(steps[0].get("prepend_scheme", "always") != "never"))
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and len(kinds) <= 4:
        replaces_space = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        strip: dict[str, Any] = (
            steps[3] if len(kinds) == 4 else {"type": "Strip", "content": " ", "start": 0, "stop": 0}
        )
        if replaces_space and strip["type"] == "Strip" and strip["content"] == " " and strip["stop"] == 0:
            return Decoding("sentencepiece", int(strip["start"]))
    return Decoding("other")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: character → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    spelling = {chr(byte): byte for byte in printable}
    return spelling | {chr(256 + position): byte for position, byte in enumerate(shifted)}


_BYTES: Final = byte_alphabet()


def spelled_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; added tokens that use other characters are their own UTF-8."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()


class _Rule(Protocol):
    def push(self, token: str) -> str: ...

    def finish(self) -> str: ...


class _ByteLevel:
    """Settled: everything but the first bytes of an unfinished character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        return self._decoder.decode(spelled_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _SentencePiece:
    """Settled: everything but the present run of byte tokens, which is text only if all of it is UTF-8."""

    def __init__(self, strip: int) -> None:
        self._run = bytearray()
        self._strip = strip

    def push(self, token: str) -> str:
        match = BYTE_TOKEN.fullmatch(token)
        if match:
            self._run.append(int(str(match[1]), 16))
            return ""
        return self._end_run() + self._stripped(token.replace(_SPACE, " "))

    def finish(self) -> str:
        return self._end_run()

    def _end_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = bytes(self._run), bytearray()
        try:
            text = run.decode()
        except UnicodeDecodeError:
            text = "\ufffd" * len(run)
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                text = text[1:]
                self._strip -= 1
        return text


class _Metaspace:
    """Every token is settled at once."""

    def __init__(self, strip: int) -> None:
        self._drop_first = bool(strip)

    def push(self, token: str) -> str:
        text = token.replace(_SPACE, "" if self._drop_first else " ")
        self._drop_first = False
        return text

    def finish(self) -> str:
        return ""


class IncrementalDetokenizer:
    """Text of one growing sequence of ids. ``"".join(pushes) + finish()`` is ``tokenizer.decode(all ids)``.

    Constant work per token for the decoders in use (byte-level, SentencePiece, Metaspace). Others are decoded
    as a whole on every push; there a text may be shown that a later token changes, and is then not corrected.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._rule = _rule_for(tokenizer.decoding)
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids settle. Ids outside the vocabulary are ignored, as ``decode`` does."""
        if self._rule is None:
            return self._push_other(ids)
        token_of, skip, rule = self._tokenizer.token, self._skip, self._rule
        tokens = (token_of(number) for number in ids if number not in skip)
        return "".join(rule.push(token) for token in tokens if token is not None)

    def finish(self) -> str:
        """The rest, however damaged; after it the detokenizer is spent."""
        if self._rule is not None:
            return self._rule.finish()
        text = self._tokenizer.decode(self._ids, self._skip_special_tokens)
        rest, self._shown = text[self._shown :], len(text)
        return rest

    def _push_other(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        text = self._tokenizer.decode(self._ids, self._skip_special_tokens).rstrip("\ufffd")
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def _rule_for(decoding: Decoding) -> _Rule | None:
    if decoding.kind == "byte-level":
        return _ByteLevel()
    if decoding.kind == "sentencepiece":
        return _SentencePiece(decoding.strip)
    return _Metaspace(decoding.strip) if decoding.kind == "metaspace" else None
