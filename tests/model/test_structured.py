"""Structured output through the whole engine, on a tiny model of random weights: it wants nothing in particular, so
that whatever is right about its outputs is the grammar's doing."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest

from foretell import LLM, AsyncLLM, SamplingParams, StructuredOutput
from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.errors import InvalidRequestError
from foretell.executor.replay import ReplayExecutor, replay
from foretell.grammar.compiler import GrammarCompiler
from foretell.store import load_tokenizer, resolve
from tests.model import test_device_runner as device
from tests.model import test_whatever_happens_around as plain
from tests.schemas import random_schema
from tests.server.tiny import tiny_folder, write_model

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "string", "maxLength": 5}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
CODE = StructuredOutput.regex("[ab]{3,6}c")
END = 258  # the tiny model's <|im_end|>


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "kv_cache_bytes": 4_000_000}
    with LLM(str(tiny_folder()), block_size=4, **options) as llm:
        yield llm


def params(form: StructuredOutput, **more: Any) -> SamplingParams:
    return SamplingParams(structured=form, **{"temperature": 1.0, "max_tokens": 300, **more})


def test_random_bounded_schemas_always_validate(llm: LLM) -> None:
    rng = Random(11)
    schemas = [random_schema(rng, depth=2) for _ in range(40)]
    outputs = llm.generate(
        ["x"] * 40, [params(StructuredOutput.json_schema(s), seed=i) for i, s in enumerate(schemas)]
    )
    finished = [
        (s, o.outputs[0]) for s, o in zip(schemas, outputs, strict=True) if o.outputs[0].finish_reason == "stop"
    ]
    assert len(finished) >= 36, [o.outputs[0].error for o in outputs]
    for schema, output in finished:
        jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (CODE, r"[ab]{3,6}c"),
        (StructuredOutput.choice(["yes", "no", 'may"be\n', "ne{in}"]), r'yes|no|may"be\n|ne\{in\}'),
        (StructuredOutput.grammar('start: "a" NUMBER ";"\nNUMBER: /[0-9]{1,4}/'), r"a[0-9]{1,4};"),
        (StructuredOutput.grammar('root ::= "<" word ">"\nword ::= [a-c] [a-c]? | "zz"\n'), r"<([a-c]{1,2}|zz)>"),
    ],
)
def test_texts_have_the_form(llm: LLM, form: StructuredOutput, pattern: str) -> None:
    outputs = llm.generate(["x"] * 8, [params(form, seed=seed) for seed in range(8)])
    texts = [o.outputs[0].text for o in outputs]
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}
    assert len(set(texts)) > 1  # the model still chooses


def test_json_object_is_an_object(llm: LLM) -> None:
    outputs = llm.generate(["x"] * 12, [params(StructuredOutput.json_object(), seed=seed) for seed in range(12)])
    done = [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert done
    assert all(isinstance(json.loads(text), dict) for text in done)


def test_a_form_that_is_complete_ends_without_another_step(llm: LLM) -> None:
    output = llm.generate("x", params(StructuredOutput.choice(["abc"])))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("abc", "stop", None)
    assert len(output.token_ids) == 3  # bytes, and no end token


def test_the_end_is_allowed_exactly_where_the_form_may_end(llm: LLM) -> None:
    drawn_to_end = {END: 100.0}
    form = StructuredOutput.regex("a{2}b{0,50}")
    output = llm.generate("x", params(form, logit_bias=drawn_to_end))[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("aa", "stop", END)
    longer = llm.generate("x", params(form, logit_bias=drawn_to_end, min_tokens=10))[0].outputs[0]
    assert longer.text == "aa" + "b" * 8


def test_the_end_of_the_form_goes_before_min_tokens_and_ignore_eos(llm: LLM) -> None:
    for more in ({"min_tokens": 50}, {"ignore_eos": True}):
        output = llm.generate("x", params(StructuredOutput.choice(["abc"]), **more))[0].outputs[0]
        assert (output.text, output.finish_reason, output.error) == ("abc", "stop", None)


def test_other_constraints_work_within_the_form(llm: LLM) -> None:
    biased = llm.generate("x", params(CODE, logit_bias={llm_id(llm, "a"): -100.0}))[0].outputs[0].text
    assert re.fullmatch("b{3,6}c", biased)
    only = params(CODE, allowed_token_ids=[llm_id(llm, c) for c in "bc"])
    assert re.fullmatch("b{3,6}c", llm.generate("x", only)[0].outputs[0].text)
    stopped = llm.generate("x", params(StructuredOutput.choice(["abcdef"]), stop=["cd"]))[0].outputs[0]
    assert (stopped.text, stopped.stop_reason) == ("ab", "cd")
    penalised = params(CODE, temperature=0, repetition_penalty=5.0, frequency_penalty=2.0, presence_penalty=2.0)
    assert re.fullmatch("[ab]{3,6}c", llm.generate("x", penalised)[0].outputs[0].text)
    greedy = params(CODE, temperature=0, top_k=1, min_p=0.5)
    assert re.fullmatch("[ab]{3,6}c", llm.generate("x", greedy)[0].outputs[0].text)


def llm_id(llm: LLM, letter: str) -> int:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(letter)[0]


def test_a_form_that_the_other_constraints_exclude_is_an_error_of_its_own(llm: LLM) -> None:
    impossible = params(CODE, allowed_token_ids=[llm_id(llm, "z")])
    bad, good = llm.generate(["x", "x"], [impossible, params(CODE)])
    assert bad.outputs[0].finish_reason == "error"
    assert "form" in str(bad.outputs[0].error)
    assert re.fullmatch("[ab]{3,6}c", good.outputs[0].text)


def test_logprobs_are_those_of_the_raw_distribution(llm: LLM) -> None:
    form = StructuredOutput.choice(["abc"])
    output = llm.generate("x", params(form, temperature=0, logprobs=3))[0].outputs[0]
    free = llm.generate("x", SamplingParams(temperature=0, max_tokens=1, logprobs=3))[0].outputs[0]
    assert output.logprobs is not None
    assert free.logprobs is not None
    assert output.logprobs[0].top == free.logprobs[0].top
    assert output.logprobs[0].logprob < -1  # forced, and yet unlikely


def test_the_same_text_alone_in_company_and_after_preemption(llm: LLM) -> None:
    form = StructuredOutput.regex("[a-z]{40}")
    own = params(form, seed=5)
    alone = llm.generate("hello", own)[0].outputs[0].text
    company = llm.generate(["hello", "x", "y"], [own, params(CODE), SamplingParams(max_tokens=30)])
    assert company[0].outputs[0].text == alone
    seen = []
    for update in llm.stream("hello", own):
        seen.append(update)
        if len(seen) in (7, 23):
            llm.service.call(lambda engine: [engine.preempt(i) for i in list(engine.scheduler.requests)]).result()
    assert seen[-1].output.outputs[0].text == alone
    assert seen[-1].output.metrics.preemptions >= 1


def test_n_outputs_each_have_the_form(llm: LLM) -> None:
    output = llm.generate("x", params(CODE, n=4, seed=3))[0]
    assert all(re.fullmatch("[ab]{3,6}c", o.text) for o in output.outputs)


@pytest.mark.parametrize(
    ("form", "part"),
    [
        (StructuredOutput.regex("(a"), "regex"),
        (StructuredOutput.grammar("start: missing"), "missing"),
        (StructuredOutput.json_schema({"not": {"type": "string"}}), "not"),
        (StructuredOutput.json_schema({"$ref": "#"}), "no text has this form"),
        (StructuredOutput.json_schema({"$ref": "http://127.0.0.1:1/schema.json"}), "retriev"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line_before_anything_runs(
    llm: LLM, form: StructuredOutput, part: str
) -> None:
    with pytest.raises(InvalidRequestError, match=part) as caught:
        llm.generate(["fine", "x"], [SamplingParams(max_tokens=1), params(form)])
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match=part):
        next(iter(llm.stream("x", params(form))))


def test_chat_tells_the_template_of_tools(tmp_path: Path) -> None:
    template = "{{ tools[0].function.name if tools else 'none' }}:{{ messages[-1].content }}"
    with LLM(str(write_model(tmp_path, template)), load_format="dummy", kv_cache_bytes=1_000_000) as llm:
        assert llm.tokenizer is not None
        talk, tools = [{"role": "user", "content": "Hi"}], [{"type": "function", "function": {"name": "get"}}]
        short = SamplingParams(max_tokens=1)
        output = llm.chat(talk, short, tools=tools)[0]
        assert llm.tokenizer.decode(output.prompt_token_ids) == "get:Hi"
        assert llm.tokenizer.decode(llm.chat(talk, short)[0].prompt_token_ids) == "none:Hi"


def test_asyncio_goes_on_while_a_grammar_is_compiled() -> None:
    async def run() -> tuple[str, list[str]]:
        llm = AsyncLLM(str(tiny_folder()), load_format="dummy", dtype="float32", kv_cache_bytes=2_000_000)
        try:
            slow = asyncio.create_task(llm.generate("x", params(SLOW)))
            free = [await llm.generate("x", SamplingParams(max_tokens=4)) for _ in range(3)]
            assert not slow.done()
            with pytest.raises(InvalidRequestError, match="too much time"):
                await slow
            again = llm.generate("x", params(CODE, temperature=0))
            return (await again).outputs[0].text, [str(f.outputs[0].finish_reason) for f in free]
        finally:
            llm.close()

    text, reasons = asyncio.run(run())
    assert re.fullmatch("[ab]{3,6}c", text)
    assert len(reasons) == 3


SLOW = StructuredOutput.json_schema({"type": "integer", "multipleOf": 99_999_989})  # minutes, and gigabytes


@pytest.mark.parametrize("runner", ["plain", "device"])
def test_forms_on_both_runners_and_the_twin_agrees(runner: str) -> None:
    """The twin replays the log of a run whose requests end by their forms, not by a token."""
    tokenizer = load_tokenizer(resolve(str(tiny_folder())))  # the model's vocabulary is larger
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16, max_model_len=128, block_size=4)
    events: list[Any] = []
    engine: Engine
    if runner == "plain":
        engine = plain.make_engine(config, 60, events)
    else:
        engine = device.make_engine(config, 60, events, padded=True)
    executor: Any = engine.executor
    executor.use_grammars(GrammarCompiler(lambda: tokenizer, 1024))
    try:
        forms = [StructuredOutput.regex("[a-d]{2,5}!"), StructuredOutput.choice(["yes", "no"]), None]
        for i in range(6):
            engine.add(i, [5 + i, 6, 7], SamplingParams(structured=forms[i % 3], max_tokens=30, seed=i))
        tokens: dict[int, list[int]] = {}
        reasons = {}
        steps = 0
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).append(output.token_id or 0)
                reasons[output.request_id] = output.finish_reason
            steps += 1
            if steps == 3 and runner == "plain":
                engine.preempt(engine.scheduler.running[0].id)
    finally:
        executor.grammars.close()
    assert tokenizer is not None
    texts = [tokenizer.decode(tokens[i]) for i in range(6)]
    for i, pattern in ((0, "[a-d]{2,5}!"), (3, "[a-d]{2,5}!"), (1, "yes|no"), (4, "yes|no")):
        assert re.fullmatch(pattern, texts[i]), texts
        assert reasons[i] == "stop"
    assert reasons[2] == reasons[5] == "length"
    twin = ReplayExecutor((60,), depth=executor.depth, chain=executor.chain)
    replay(events, Engine(config, twin))
    assert plain.trace_of(twin.submitted) == plain.trace_of(executor.batches)
