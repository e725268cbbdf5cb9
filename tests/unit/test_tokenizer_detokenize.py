"""Incremental detokenisation over small tokenizers of every decoder kind: the sum is exactly ``decode``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from foretell.errors import InvalidRequestError
from foretell.store import IncrementalDetokenizer, Tokenizer
from foretell.store.detokenize import byte_alphabet

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = AddedToken("<|end|>", special=True, normalized=False)
ADDED = AddedToken("<think é>", special=False, normalized=False)


def with_added(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([SPECIAL])
    backend.add_tokens([ADDED])
    return Tokenizer(backend)


def byte_level() -> Tokenizer:
    alphabet = byte_alphabet()
    tokens = [*alphabet, "Ġthe", "ðŁ", "ĻĤ", "âĤ", "Ġ", "Ċ"]
    backend = Backend(models.BPE({token: number for number, token in enumerate(dict.fromkeys(tokens))}, []))
    backend.decoder = decoders.ByteLevel()
    return with_added(backend)


def sentencepiece(strip: int) -> Tokenizer:
    tokens = [*BYTE_TOKENS, "▁", "▁▁", "▁the", "a", "é", "▁a▁b", "<0xZZ>", "日"]
    backend = Backend(models.BPE({token: number for number, token in enumerate(tokens)}, [], byte_fallback=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", strip, 0)] if strip else [])])
    return with_added(backend)


def metaspace(scheme: str) -> Tokenizer:
    tokens = ["▁", "▁▁", "▁the", "a", "é▁", "▁a▁b"]
    backend = Backend(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    backend.decoder = decoders.Metaspace("▁", scheme)
    return with_added(backend)


def wordpiece() -> Tokenizer:
    tokens = ["[UNK]", "the", "##s", "a", ",", "##é"]
    backend = Backend(models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece("##", False)
    return with_added(backend)


def no_decoder() -> Tokenizer:
    return with_added(Backend(models.BPE({"a": 0, "b": 1}, [])))


KINDS = {
    "byte-level": byte_level(), "sentencepiece": sentencepiece(0), "sentencepiece, prefix": sentencepiece(1),
    "sentencepiece, two": sentencepiece(2), "metaspace": metaspace("always"), "metaspace, never": metaspace("never"),
    "other": wordpiece(), "other, none": no_decoder(),
}  # fmt: skip


def number_of(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.backend.token_to_id(token)
    assert number is not None
    return number


@pytest.mark.parametrize("kind", KINDS)
def test_each_decoder_is_recognised(kind: str) -> None:
    assert KINDS[kind].decoding.kind == kind.partition(",")[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_the_sum_of_pushes_is_the_whole_text(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30))
    skip = data.draw(st.booleans())
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=4).map(sorted))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    parts = [detokenizer.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for position in range(len(parts)):
        assert whole.startswith("".join(parts[: position + 1]))
    assert "".join(parts) + detokenizer.finish() == whole


def test_half_a_character_is_held_back() -> None:
    tokenizer, spelled = KINDS["byte-level"], {byte: character for character, byte in byte_alphabet().items()}
    ids = [number_of(tokenizer, spelled[byte]) for byte in "aé€🙂".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([number]) for number in ids] == ["a", "", "é", "", "", "€", "", "", "", "🙂"]
    assert detokenizer.finish() == ""


def test_a_cut_character_is_shown_as_damage_at_the_end() -> None:
    tokenizer = KINDS["byte-level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([number_of(tokenizer, "ðŁ")]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_run_of_byte_tokens_is_text_only_as_a_whole() -> None:
    tokenizer = KINDS["sentencepiece"]
    ids = [number_of(tokenizer, f"<0x{byte:02X}>") for byte in "é".encode()]
    stray = number_of(tokenizer, "<0xFF>")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids) == ""  # a stray byte would turn both into damage
    assert detokenizer.push([number_of(tokenizer, "a")]) == "éa"
    assert detokenizer.push([*ids, stray]) == ""
    assert detokenizer.finish() == "\ufffd" * 3


def test_tokens_for_display() -> None:
    tokenizer = KINDS["byte-level"]
    assert tokenizer.token_text(number_of(tokenizer, "Ġthe")) == " the"
    assert tokenizer.token_text(number_of(tokenizer, "ðŁ")) == "\\xf0\\x9f"
    assert KINDS["sentencepiece"].token_text(0xE2) == "\\xe2"
    assert KINDS["sentencepiece"].token_text(number_of(KINDS["sentencepiece"], "▁the")) == " the"
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [1.5]])
def test_what_are_no_ids(ids: list[Any]) -> None:
    with pytest.raises(InvalidRequestError):
        KINDS["byte-level"].decode(ids)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", None, 3, b"bytes"])
def test_what_is_no_text(text: Any) -> None:
    with pytest.raises(InvalidRequestError):
        KINDS["byte-level"].encode(text)
