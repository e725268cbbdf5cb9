"""Loading tokenizers from folders and from (small or damaged) GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from foretell.errors import ForetellError, InvalidRequestError, ModelFormatError, UnsupportedModelError
from foretell.store import load_tokenizer, resolve
from foretell.store.detokenize import byte_alphabet
from foretell.store.gguf_tokenizer import derive_merges
from foretell.store.pretokenizers import byte_level_splitter
from foretell.store.tokenizer import Tokenizer, from_gguf_metadata

HERE = Path("m.gguf")
MESSAGES = [{"role": "user", "content": "hi"}]


def folder(path: Path, **files: Any) -> Path:
    alphabet = [*byte_alphabet(), "Ġh", "Ġhi"]
    backend = Backend(models.BPE({t: i for i, t in enumerate(alphabet)}, [("Ġ", "h"), ("Ġh", "i")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_end|>", special=True)])
    backend.enable_truncation(4)
    backend.save(str(path / "tokenizer.json"))
    for name, content in {"config": {"eos_token_id": 7}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def load(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(resolve(str(path)))
    assert tokenizer is not None
    return tokenizer


def test_a_folder(tmp_path: Path) -> None:
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "chat_template": "{{ bos_token }}x"}
    tokenizer = load(folder(tmp_path, tokenizer_config=settings, generation_config={"eos_token_id": [5, 6]}))
    assert tokenizer.decode(tokenizer.encode(" hi there, longer than four")) == " hi there, longer than four"
    assert tokenizer.bos_token_id == tokenizer.backend.token_to_id("<s>")
    assert tokenizer.eos_token_ids == {5, 6, tokenizer.backend.token_to_id("<|im_end|>")}
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES) == "<s>x"


def test_the_configurations_eos_without_a_generation_config(tmp_path: Path) -> None:
    assert 7 in load(folder(tmp_path)).eos_token_ids


def test_a_template_file_beats_the_configurations(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new")
    assert load(tmp_path).apply_chat_template(MESSAGES) == "new"


def test_templates_by_name(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load(folder(tmp_path, tokenizer_config={"chat_template": templates}))
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"type": "function"}]) == "tools"


def test_without_a_template(tmp_path: Path) -> None:
    tokenizer = load(folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="--raw"):
        tokenizer.apply_chat_template(MESSAGES)


def test_tokens_that_only_the_configuration_adds(tmp_path: Path) -> None:
    added = {"300": {"content": "<|x|>", "special": True, "normalized": False}, "bad": 3}
    tokenizer = load(folder(tmp_path, tokenizer_config={"added_tokens_decoder": added}))
    assert len(tokenizer.encode("<|x|>")) == 1


def test_special_tokens_that_only_the_configuration_calls_so(tmp_path: Path) -> None:
    stated = {"eos_token": "Ġhi", "additional_special_tokens": ["Ġh", "no"]}
    tokenizer = load(folder(tmp_path, tokenizer_config=stated))
    ids = [tokenizer.backend.token_to_id(text) for text in ("Ġhi", "Ġh")]
    assert set(ids) <= tokenizer.special_ids
    assert tokenizer.decode(ids) == ""
    assert tokenizer.backend.token_to_id("no") is None, "a token without an embedding must not come about"


def test_what_stands_around_a_text_is_for_tokenizer_json_to_say(tmp_path: Path) -> None:
    """As transformers 5 has it, whatever ``add_bos_token`` says beside it."""
    folder(tmp_path, tokenizer_config={"bos_token": "<s>", "add_bos_token": False, "add_eos_token": True})
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(" hi"), skip_special_tokens=False) == "<s> hi"


def test_more_templates_lie_beside_the_first(tmp_path: Path) -> None:
    folder(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (tmp_path / "chat_template.jinja").write_text("plain")
    tokenizer = load(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"type": "function"}]) == "tools"


def test_the_end_token_of_a_multimodal_models_text_half(tmp_path: Path) -> None:
    assert 9 in load(folder(tmp_path, config={"text_config": {"eos_token_id": [9]}})).eos_token_ids


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    (folder(tmp_path) / "tokenizer.json").unlink()
    assert load_tokenizer(resolve(str(tmp_path))) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        load_tokenizer(resolve(str(tmp_path)))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"version": "1.0"}'])
def test_a_broken_tokenizer_file(tmp_path: Path, content: str) -> None:
    (folder(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json") as caught:
        load_tokenizer(resolve(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_frame_of_tokens_that_are_nowhere(tmp_path: Path) -> None:
    """The library panics on it, at the first prompt; a panic is no Exception, and would end the process."""
    file = folder(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match=r"tokenizer\.json is no valid tokenizer"):
        load(tmp_path)


def test_a_vocabulary_of_words_spells_what_it_can(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"one": 0, "two": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder(tmp_path) / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("two one") == [1, 0]
    with pytest.raises(InvalidRequestError, match="cannot spell") as caught:
        tokenizer.encode("three")
    assert "\n" not in str(caught.value)


# --- GGUF ------------------------------------------------------------------------------------------------


def gguf(kind: str | None = "gpt2", **metadata: Any) -> dict[str, Any]:
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return {"general.architecture": "llama", **({"tokenizer.ggml.model": kind} if kind else {}), **prefixed}


def build(metadata: dict[str, Any]) -> Tokenizer:
    tokenizer = from_gguf_metadata(metadata, HERE)
    assert tokenizer is not None
    return tokenizer


TOKENS = [*byte_alphabet(), "<|endoftext|>", "<|im_end|>", "<think>", "Ġh", "Ġhi"]
TYPES = [*([1] * 256), 3, 3, 4, 1, 1]
BPE: dict[str, Any] = {"tokens": TOKENS, "token_type": TYPES, "merges": ["Ġ h", "Ġh i"], "pre": "gpt-2"}


def test_byte_level_from_gguf() -> None:
    tokenizer = build(gguf(**BPE, eos_token_id=257, bos_token_id=256, add_bos_token=True))
    assert tokenizer.encode(" hi<think><|im_end|>") == [256, 260, 258, 257]
    assert tokenizer.encode(" hi", add_special_tokens=False) == [260]
    assert tokenizer.decode([256, 260, 258, 257]) == " hi<think>"
    assert tokenizer.eos_token_ids == {256, 257}
    assert (tokenizer.bos_token_id, tokenizer.vocab_size) == (256, 261)


@pytest.mark.parametrize(
    ("pre", "stated", "framed"),
    [
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("qwen2", {}, False),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_llama_3_begins_with_bos_where_its_file_does_not_say(pre: str, stated: dict[str, Any], framed: bool) -> None:
    tokenizer = build(gguf(**BPE | {"pre": pre}, bos_token_id=256, **stated))
    assert tokenizer.encode(" hi") == ([256, 260] if framed else [260])


def test_sentencepiece_with_and_without_a_prefix_space() -> None:
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "  ", "<tag>"]
    types = [2, 3, *([6] * 256), 1, 1, 1, 1, 1, 4, 4]
    scores = [0.0] * 258 + [-5.0, -6.0, -7.0, -1.0, -2.0, -1000.0, 0.0]
    metadata: dict[str, Any] = {"tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1,
                                "unknown_token_id": 0}  # fmt: skip
    plain = build(gguf("llama", **metadata, add_space_prefix=False))
    assert plain.encode("ab ab") == [1, 259, 260, 262]
    assert plain.encode("a  b<tag>é", add_special_tokens=False) == [259, 263, 260, 264, 2 + 0xC3, 2 + 0xA9]
    assert plain.decode(plain.encode("a  b<tag>é ")) == "a  b<tag>é "
    prefixed = build(gguf("llama", **metadata))
    assert prefixed.encode("ab") == [1, 262]
    assert prefixed.decode([1, 262, 261]) == "ab a"


def test_unigram_takes_the_best_path() -> None:
    tokens, scores = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab", "▁a"], [0, 0, 0, -2, -3, -3, -4, -2.5]
    metadata: dict[str, Any] = {"tokens": tokens, "token_type": [3, 3, 2, 1, 1, 1, 1, 1],
                                "scores": [float(s) for s in scores],
                                "eos_token_id": 1, "unknown_token_id": 2}  # fmt: skip
    tokenizer = build(gguf("t5", **metadata))
    assert tokenizer.encode("ab a") == [6, 7, 1]
    assert tokenizer.decode([6, 7, 1]) == "ab a"


def test_merges_from_scores() -> None:
    tokens = ["a", "b", "c", "ab", "abc", "bc"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = derive_merges(tokens, [1] * 6, [0, 0, 0, -2.0, -3.0, -1.0], vocab)
    named = [(tokens[left], tokens[right]) for left, right in merges]
    assert named == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


def test_derived_merges_are_cached_and_a_damaged_cache_is_ignored(tmp_path: Path) -> None:
    tokens = ["<unk>", *"abc", "ab", "abc"]
    metadata = gguf("llama", tokens=tokens, token_type=[2, 1, 1, 1, 1, 1], scores=[0.0, 0, 0, 0, -1, -2],
                    add_space_prefix=False, add_bos_token=False, unknown_token_id=0)  # fmt: skip
    first = from_gguf_metadata(metadata, HERE, tmp_path)
    (file,) = (tmp_path / "tokenizers").iterdir()
    for content in (file.read_bytes(), b"", b"rubbish", file.read_bytes()[:-3]):
        file.write_bytes(content)
        again = from_gguf_metadata(metadata, HERE, tmp_path)
        assert first is not None
        assert again is not None
        assert first.encode("abcab") == again.encode("abcab") == [5, 4]


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_gguf_without_a_tokenizer(kind: str | None) -> None:
    assert from_gguf_metadata(gguf(kind), HERE) is None


BROKEN: dict[str, tuple[dict[str, Any], type[ForetellError]]] = {
    "another kind": (gguf("bert"), UnsupportedModelError),
    "a kind that is no text": (gguf(**BPE) | {"tokenizer.ggml.model": 3}, UnsupportedModelError),
    "no tokens": (gguf(), ModelFormatError),
    "tokens are numbers": (gguf(tokens=[1, 2]), ModelFormatError),
    "types missing": (gguf(tokens=["a", "b"], token_type=[1]), ModelFormatError),
    "no merges": (gguf(tokens=["a"], token_type=[1]), ModelFormatError),
    "merge of unknown tokens": (gguf(**{**BPE, "merges": ["x y"]}), ModelFormatError),
    "merge without a space": (gguf(**{**BPE, "merges": ["xy"]}), ModelFormatError),
    "merges are numbers": (gguf(**{**BPE, "merges": [1]}), ModelFormatError),
    "unknown splitter": (gguf(**{**BPE, "pre": "someone-elses"}), UnsupportedModelError),
    "scores missing": (gguf("llama", tokens=["a"], token_type=[1]), ModelFormatError),
    "scores are texts": (gguf("llama", tokens=["a", "aa"], token_type=[1, 1], scores=["x", "y"]), ModelFormatError),
    "unknown out of range": (
        gguf("t5", tokens=["a"], token_type=[1], scores=[0.0], unknown_token_id=9), ModelFormatError,
    ),
    "charsmap": (
        gguf("t5", tokens=["a"], token_type=[1], scores=[0.0], unknown_token_id=0, precompiled_charsmap=["x"]),
        ModelFormatError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_metadata(case: str) -> None:
    metadata, error = BROKEN[case]
    with pytest.raises(error) as caught:
        from_gguf_metadata(metadata, HERE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", " a", "  ", " b", "\n", "\n", "!?"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " a", "  ", " b", "\n", "\n", "!?"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " a", "  ", " b", "\n\n", "!?"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " a", "  ", " b", "\n\n", "!?"]),
        ("falcon", ["It", "'", "s", " ", "123", "45", " a", "  ", " b", "\n\n", "!?"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", " a", "  ", " b", "\n\n", "!?"]),
        ("gpt-4o", ["It's", " ", "123", "45", " a", "  ", " b", "\n\n", "!?"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "45", " a", "  ", " b", "\n\n", "!?"]),
    ],
)
def test_splitters(name: str, pieces: list[str]) -> None:
    text = "It's 12345 a   b\n\n!?"
    found = [text[a:b] for _, (a, b) in byte_level_splitter(name).pre_tokenize_str(text)]
    assert found == pieces
