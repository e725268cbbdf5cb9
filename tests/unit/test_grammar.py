"""Grammars outside of the engine: vocabularies of every kind, and compilers that nobody can stall."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from random import Random
from typing import Any

import jsonschema
import numpy as np
import pytest

from foretell.core.structured import StructuredOutput
from foretell.errors import ForetellError, InvalidRequestError, OverloadedError
from foretell.grammar import compiler as compiler_module
from foretell.grammar import matcher as matcher_module
from foretell.grammar.compiler import GrammarCompiler
from foretell.grammar.guard import GrammarGuard
from foretell.grammar.matcher import FormMatcher
from foretell.grammar.vocabulary import Vocabulary
from foretell.store.tokenizer import Tokenizer
from tests.schemas import wide_schema

END = "</s>"


def byte_level(*, end: bool = True) -> Tokenizer:
    """GPT-2's alphabet and a few merges, trained on nothing."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    for word in ('{"', "ab", "Ġa"):
        vocab[word] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[("{", '"'), ("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    ends = frozenset({backend.token_to_id(END)}) if end else frozenset()
    return Tokenizer(backend, eos_token_ids=ends)


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: ▁ for a space, one put in front of every text, unknown characters as bytes."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    tokens = [
        "<unk>",
        END,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *'abcdefyesno0123456789{}[]":,',
        "▁a",
        "ab",
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Backend(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", END)])
    return Tokenizer(backend, eos_token_ids=frozenset({1}))


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(byte_level, 300)
    yield made
    made.close()


def walk(matcher: FormMatcher, rng: Random, steps: int = 200) -> list[int]:
    """Random tokens that the form allows, to its end."""
    ids: list[int] = []
    while not (matcher.ended or matcher.error) and len(ids) < steps:
        ids.append(rng.choice(np.flatnonzero(matcher.allowed()).tolist()))
        matcher.accept(ids[-1])
    return ids


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", ['{"ab": [1, "ü€😀"]}', " ab", "ab", "  a\n", "▁", ""])
def test_text_is_spelled_with_its_own_bytes(make: Any, text: str) -> None:
    vocabulary = Vocabulary(make(), 400, (1,))
    ids = vocabulary(text)
    assert b"".join(vocabulary.tokens[i] for i in ids) == text.encode()


def test_a_text_is_spelled_as_the_tokenizer_does() -> None:
    tokenizer = byte_level()
    assert Vocabulary(tokenizer, 400, (1,))('{"ab a') == tokenizer.encode('{"ab a')
    tokenizer = sentencepiece()
    assert [tokenizer.token(i) for i in Vocabulary(tokenizer, 400, (1,))("ab a")] == ["ab", "▁a"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_random_walks_through_a_form_decode_to_it(make: Any) -> None:
    made = GrammarCompiler(make, 512)  # more ids than there are tokens
    tokenizer = make()
    form = StructuredOutput.json_schema(
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "ü": {"enum": [1, None]}},
         "required": ["a", "ü"], "additionalProperties": False}
    )  # fmt: skip
    try:
        for seed in range(20):
            matcher = made.matcher(form)
            ids = walk(matcher, Random(seed))
            assert matcher.ended, matcher.error
            assert max(ids) < tokenizer.vocab_size
            value = json.loads(tokenizer.decode(ids))
            assert set(value) == {"a", "ü"}
            assert len(value["a"]) <= 9
    finally:
        made.close()


def test_ids_beyond_the_models_vocabulary_are_never_allowed() -> None:
    """The tokenizer has 260 tokens, the model 100: its mask has 100 bits, and text needs no other token."""
    made = GrammarCompiler(byte_level, 100)
    try:
        matcher = made.matcher(StructuredOutput.regex("[0-9]{1,3}"))
        assert matcher.allowed().shape == (100,)
        ids = walk(matcher, Random(0))
        assert ids
        assert max(ids) < 100
    finally:
        made.close()


def test_a_model_without_an_end_token_ends_by_the_form_alone() -> None:
    made = GrammarCompiler(lambda: byte_level(end=False), 260)
    try:
        matcher = made.matcher(StructuredOutput.regex("[0-9]{2,4}"))
        assert len(walk(matcher, Random(1))) == 4
        assert matcher.ended
    finally:
        made.close()


def test_a_matcher_goes_on_after_the_tokens_it_is_given(compiler: GrammarCompiler) -> None:
    form = StructuredOutput.regex("[0-9]{2}-[a-z]{3}")
    ids = walk(compiler.matcher(form), Random(3))
    for cut in range(len(ids)):
        resumed = compiler.matcher(form, ids[:cut])
        assert resumed.allowed()[ids[cut]]
        assert not resumed.ended
    assert compiler.matcher(form, ids).ended


def test_whatever_compiles_is_valid_whichever_tokens_are_drawn(compiler: GrammarCompiler) -> None:
    """jsonschema is the oracle. Schemas that cannot be followed exactly have to be refused."""
    rng = Random(4)
    valid = refused = 0
    for _ in range(200):
        schema = wide_schema(rng)
        form = StructuredOutput.json_schema(schema)
        if compiler.submit(form).exception(60) is not None:
            refused += 1
            continue
        for _ in range(2):
            matcher = compiler.matcher(form)
            ids = walk(matcher, rng, steps=250)
            if matcher.ended:
                jsonschema.Draft202012Validator(schema).validate(json.loads(byte_level().decode(ids)))
                valid += 1
    assert valid > 200
    assert refused < 100


@pytest.mark.parametrize(
    "more",
    [{"uniqueItems": False}, {"format": "int32"}, {"title": "x"}, {"examples": [1], "default": 1}, {"x-own": 1}],
)
def test_what_says_nothing_is_no_reason_to_refuse(compiler: GrammarCompiler, more: dict[str, Any]) -> None:
    named = {"type": "object", "properties": {"format": {"type": "string", **more}}}
    compiler.compile(StructuredOutput.json_schema(named))
    compiler.compile(StructuredOutput.json_schema({"enum": [{"format": "byte", "uniqueItems": False}]}))
    compiler.compile(StructuredOutput.json_schema(True))


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 4}]}, "use anyOf"),
        ({"type": "integer", "exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"type": "string", "pattern": "^(?=a)b"}, "look"),
        ({"type": "string", "x-guidance": {"lenient": True}, "not": {}}, "not"),
        (False, "false"),
        ({"required": ["b"], "properties": {}, "additionalProperties": False, "type": "object"}, "unsatisfiable"),
    ],
)
def test_what_cannot_be_followed_exactly_is_refused(compiler: GrammarCompiler, schema: Any, part: str) -> None:
    with pytest.raises(InvalidRequestError, match=part) as caught:
        compiler.compile(StructuredOutput.json_schema(schema))
    assert "\n" not in str(caught.value)


# --- CVE-2025-29770: grammars and expressions that explode -----------------------------------------------


def doubled(key: str, levels: int = 40) -> dict[str, Any]:
    parts = {f"a{i}": {key: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**parts, f"a{levels}": {"type": "string"}}}


def crossed(key: str) -> dict[str, Any]:
    return {
        "allOf": [{key: [{"properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]} for i in range(14)]
    }


EXPLOSIVE = {
    "nested counts": StructuredOutput.regex("(a{1,1000}){1,1000}"),
    "a long tail": StructuredOutput.regex("(.*a.{200})"),
    "a wide intersection": StructuredOutput.regex("(.*a.{20})&(.*b.{20})&(.*c.{20})"),
    "letters and counts": StructuredOutput.regex(r"(\p{L}{1,50}\s\w{1,80}[^\d]{3,90})*"),
    "deep parentheses": StructuredOutput.regex("(" * 3000 + "a" + ")" * 3000),
    "doubling anyOf": StructuredOutput.json_schema(doubled("anyOf")),
    "doubling allOf": StructuredOutput.json_schema(doubled("allOf")),
    "crossing anyOf": StructuredOutput.json_schema(crossed("anyOf")),
    "crossing oneOf": StructuredOutput.json_schema(crossed("oneOf")),
    "large counts": StructuredOutput.json_schema(
        {"items": {"minItems": 10**6, "maxItems": 10**9}, "minItems": 10**6}
    ),
    "long strings": StructuredOutput.json_schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "many patterns": StructuredOutput.json_schema(
        {"allOf": [{"type": "string", "pattern": f".*{c}.{{30}}.*"} for c in "abcdefghijkl"]}
    ),
    "doubling rules": StructuredOutput.grammar(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"'
    ),
    "doubling terminals": StructuredOutput.grammar(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"'
    ),
    "ambiguity": StructuredOutput.grammar('start: a\na: a a | a a a | /[a-z ]/ | ""\n'),
    "nested stars": StructuredOutput.grammar('start: ((("a"*)*)*)*'),
    "a rule that is itself": StructuredOutput.grammar("start: start"),
    "GBNF without an end": StructuredOutput.grammar("root ::= " + "(" * 2000),
}


@pytest.mark.parametrize("name", list(EXPLOSIVE))
def test_cve_2025_29770_an_explosive_form_is_refused_or_stays_cheap(name: str, compiler: GrammarCompiler) -> None:
    """Either it is refused in one line, or each of its steps stays within what a step may cost; CPU time, as the
    limits count it."""
    form = EXPLOSIVE[name]
    refused = compiler.submit(form).exception(60)
    if refused is not None:
        assert isinstance(refused, InvalidRequestError)
        assert "\n" not in str(refused)
        assert len(str(refused)) < 500
        return
    matcher = compiler.matcher(form)
    walk(matcher, Random(0), steps=60)
    assert matcher.longest_seconds < 2 * matcher_module.STEP_SECONDS
    assert "\n" not in matcher.error


def test_cve_2025_29770_a_compilation_without_end_is_ended_and_the_next_one_works() -> None:
    """llguidance itself would take minutes and gigabytes for this one."""
    guard = GrammarGuard()
    try:
        with pytest.raises(InvalidRequestError, match="too much time or memory"):
            guard.check(StructuredOutput.json_schema({"type": "integer", "multipleOf": 99_999_989}))
        text, size = guard.check(StructuredOutput.regex("[0-9]+"))
        assert "[0-9]+" in text
        assert size >= 0
    finally:
        guard.close()


def test_closing_does_not_wait_for_a_check_in_progress() -> None:
    made = GrammarCompiler(byte_level, 260)
    made.compile(StructuredOutput.regex("a"))
    waiting = made.submit(StructuredOutput.json_schema({"type": "integer", "multipleOf": 99_999_989}))
    made.close()
    assert isinstance(waiting.exception(60), ForetellError)
    assert not isinstance(waiting.exception(), InvalidRequestError)
    with pytest.raises(ForetellError, match="closed"):
        made.compile(StructuredOutput.regex("b"))
    assert isinstance(made.submit(StructuredOutput.regex("b")).exception(60), ForetellError)


def test_a_checker_that_was_killed_is_started_again() -> None:
    guard = GrammarGuard()
    try:
        guard.check(StructuredOutput.regex("a"))
        assert guard._process is not None
        guard._process.kill()
        guard._process.wait()
        assert guard.check(StructuredOutput.regex("b"))[0]
    finally:
        guard.close()
    assert guard._process is None


def test_a_step_that_takes_too_long_ends_its_request_alone(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = StructuredOutput.regex("[a-z]+")
    monkeypatch.setattr(matcher_module, "STEP_SECONDS", 0.0)
    matcher = compiler.matcher(form)
    matcher.allowed()
    assert "too much time" in matcher.error
    assert not matcher.allowed().any()
    monkeypatch.undo()
    assert compiler.matcher(form).allowed().any()


def test_many_cheap_steps_are_allowed_and_many_costly_ones_are_not(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = StructuredOutput.regex("[a-z]+")
    monkeypatch.setattr(matcher_module, "TOTAL_SECONDS", 0.0)
    monkeypatch.setattr(matcher_module, "TOTAL_SECONDS_PER_TOKEN", 1.0)
    matcher = compiler.matcher(form)
    matcher.accept(97 - 33)
    for _ in range(50):
        matcher.accept(int(np.flatnonzero(matcher.allowed())[0]))
    assert not matcher.error
    monkeypatch.setattr(matcher_module, "TOTAL_SECONDS_PER_TOKEN", 0.0)
    matcher.allowed()
    assert "too much time" in matcher.error


# --- compiling ------------------------------------------------------------------------------------------


def test_forms_and_their_errors_are_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = GrammarGuard.check

    def counting(self: GrammarGuard, form: StructuredOutput) -> tuple[str, int]:
        checked.append(form.value)
        return check(self, form)

    monkeypatch.setattr(GrammarGuard, "check", counting)
    monkeypatch.setattr(compiler_module, "CACHE_ENTRIES", 2)
    made = GrammarCompiler(byte_level, 260)
    try:
        for value in ("a", "a", "b", "a"):
            made.compile(StructuredOutput.regex(value))
        for _ in range(2):
            with pytest.raises(InvalidRequestError):
                made.compile(StructuredOutput.regex("(c"))
        made.compile(StructuredOutput.regex("a"))
        made.compile(StructuredOutput.regex("b"))  # it had to make room
    finally:
        made.close()
    assert checked == ["a", "b", "(c", "b"]


def test_known_forms_do_not_wait_behind_one_that_is_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    check = GrammarGuard.check

    def gated(self: GrammarGuard, form: StructuredOutput) -> tuple[str, int]:
        if form.value == "slow":
            entered.set()
            gate.wait(30)
        return check(self, form)

    monkeypatch.setattr(GrammarGuard, "check", gated)
    monkeypatch.setattr(compiler_module, "MAX_WAITING", 2)
    made = GrammarCompiler(byte_level, 260)
    try:
        known = StructuredOutput.regex("known")
        made.compile(known)
        waiting: list[Future[None]] = [made.submit(StructuredOutput.regex("slow"))]
        assert entered.wait(30)
        assert made.submit(known).done()
        assert made.matcher(known).allowed().any()
        waiting.append(made.submit(StructuredOutput.regex("other")))
        with pytest.raises(OverloadedError):
            made.submit(StructuredOutput.regex("one more"))
        assert not any(future.done() for future in waiting)
        waiting += [made.submit(StructuredOutput.regex("other")) for _ in range(100)]  # the same costs nothing
        assert not waiting[-1].cancel()
        gate.set()
        for future in waiting:
            future.result(30)
    finally:
        gate.set()
        made.close()


def test_a_model_without_a_tokenizer_has_no_structured_output() -> None:
    made = GrammarCompiler(lambda: None, 100)
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        made.compile(StructuredOutput.json_object())
    made.close()


def test_the_checker_ends_with_its_parent_whatever_it_is_compiling() -> None:
    guard = GrammarGuard()
    guard.check(StructuredOutput.regex("a"))
    process = guard._process
    assert process is not None
    assert process.stdin is not None
    slow = {"kind": "json_schema", "value": '{"type": "integer", "multipleOf": 99999989}'}
    process.stdin.write(json.dumps(slow).encode() + b"\n")
    process.stdin.close()
    assert process.wait(30) == 0  # not by the limit on CPU time
    guard.close()
