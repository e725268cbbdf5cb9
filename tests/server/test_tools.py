"""Tool calls out of a model's text: every format, in any pieces; what is no call is never lost."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.errors import InvalidRequestError
from foretell.server.tools import (
    TOOL_FORMATS,
    ConstrainedParser,
    detect_tool_format,
    tool_choice_schema,
    tool_parser_for,
)

ARGS = {"city": 'Zürich </tool_call> "x" [1]{2}', "days": 3, "deep": {"a": [1, None, True]}}
JSON_ARGS = json.dumps(ARGS, ensure_ascii=False)
CALL = json.dumps({"name": "weather", "arguments": ARGS}, ensure_ascii=False)
DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"

WHOLE = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "llama3": json.dumps({"name": "weather", "parameters": ARGS}),
    "mistral": f"[TOOL_CALLS] [{CALL}]",
    "granite": f"<|tool_call|>[{CALL}]",
    "json": f"[{CALL}]",
    "pythonic": f"[weather(city={ARGS['city']!r}, days=3, deep={{'a': [1, None, True]}})]",
    "deepseek": DEEPSEEK.format(f"weather<｜tool▁sep｜>{JSON_ARGS}"),
}
OTHERS = [
    ("hermes", f"<tool_call>[{CALL}]</tool_call>"),
    ("hermes", f"<tool_call>{CALL}"),  # the end marker was the end of the turn
    (
        "hermes",
        "<tool_call>\n<function=weather>\n<parameter=city>\n"
        + ARGS["city"].replace("</tool_call>", "x")  # type: ignore[attr-defined]
        + "\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    ),
    (
        "hermes",  # quotes that do not come in pairs, and the end marker within a text
        '<tool_call>\n<function=weather>\n<parameter=city>\nZürich, 5" of snow</tool_call>\n</parameter>\n'
        "</function>\n</tool_call>",
    ),
    ("llama3", "<|python_tag|>" + WHOLE["llama3"]),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{JSON_ARGS}"),
    ("mistral", f"[TOOL_CALLS]weather{JSON_ARGS}"),
    ("granite", f"<function_call> {CALL}"),
    ("json", CALL),
    ("pythonic", "<|python_start|>" + WHOLE["pythonic"]),
    ("deepseek", DEEPSEEK.format(f"function<｜tool▁sep｜>weather\n```json\n{JSON_ARGS}\n```")),
]


def parse(name: str, pieces: list[str], names: list[str] | None = None) -> tuple[str, list[tuple[str, Any]]]:
    """The text, and (name, arguments) of the calls."""
    parser = tool_parser_for(name, names)
    texts, calls = [], []
    for text, deltas in [*map(parser.push, pieces), parser.finish()]:
        texts.append(text)
        calls += deltas
    assert [c.index for c in calls] == list(range(len(calls)))
    assert len({c.id for c in calls}) == len(calls)
    return "".join(texts), [(str(c.name), json.loads(c.arguments)) for c in calls]


def test_every_format_is_tested() -> None:
    assert set(WHOLE) == set(TOOL_FORMATS)


@pytest.mark.parametrize(("name", "text"), list(WHOLE.items()))
def test_a_call_is_read(name: str, text: str) -> None:
    assert parse(name, [text]) == ("", [("weather", ARGS)])
    assert parse(name, list(text)) == ("", [("weather", ARGS)])


@pytest.mark.parametrize(("name", "text"), OTHERS)
def test_its_other_spellings_are_read(name: str, text: str) -> None:
    shown, calls = parse(name, list(text))
    assert shown == ""
    assert [c[0] for c in calls] == ["weather"]
    assert calls[0][1]["city"].startswith("Zürich")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call><function=f>" + "<parameter=a>" * 40_000 + "</function></tool_call>",
        "<tool_call>" + "<function=" * 40_000 + "</tool_call>",
        "<｜tool▁calls▁begin｜>" + "<｜tool▁call▁begin｜>" * 40_000 + "<｜tool▁calls▁end｜>",
    ],
    ids=lambda text: text[:20],
)
def test_beginnings_without_ends_are_read_once(text: str) -> None:
    """An answer can be made to repeat what a reader looks for: work grows with its length, not with its square
    (which took minutes here)."""
    name = "hermes" if text.startswith("<tool_call>") else "deepseek"
    started = time.process_time()
    assert parse(name, [text]) == (text, [])
    assert time.process_time() - started < 8  # of work, whatever else the machine does


@pytest.mark.parametrize("name", ["hermes", "mistral", "granite", "deepseek"])
def test_text_around_calls_is_shown(name: str) -> None:
    text, calls = parse(name, ["Let me see.\n\n", WHOLE[name], "\n", WHOLE[name], " Done. "])
    assert text == "Let me see. Done. "
    assert [c[0] for c in calls] == ["weather"] * 2


def test_several_calls_without_markers() -> None:
    two = WHOLE["llama3"] + "; " + WHOLE["llama3"]
    assert parse("llama3", list(two)) == ("", [("weather", ARGS)] * 2)
    assert parse("pythonic", ["[a(), b(x=-1, y=[2.5])]"]) == ("", [("a", {}), ("b", {"x": -1, "y": [2.5]})])


TEXTS = [
    "Plain words, no call.",
    "a < b and <tool_ is half a marker",
    "  [1] is a footnote; {braces} too.  ",
    "<tool_call>not json</tool_call> and on",
    '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    '{"name": "Bob", "age": 3}',
    '{"name": "weather", "parameters": "no object"}',
    '{"name": "weather", "parameters": {"x": NaN}}',
    "[TOOL_CALLS] is how it begins\nand no more",
    "[TOOL_CALLS]",
    "<tool_call>",
    "<|tool_call|>[",
    '[f(1), g(x="a")]',
    "[f(x=open('/etc/passwd'))]",
    "[__import__('os').system(x='id')]",
    "[f(**{'a': 1})]",
    '<tool_call>{"name": "weather", "arguments": {"a": "',
    "<｜tool▁calls▁begin｜>x<｜tool▁calls▁end｜>",
    "\n\n  ",
    "",
    "[" * 500 + "]" * 500,
    '{"a":' * 500 + "1" + "}" * 500,
]


@pytest.mark.parametrize("name", list(WHOLE))
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_comes_out_as_it_is(name: str, text: str) -> None:
    assert parse(name, list(text)) == (text, [])


def test_calls_of_tools_that_do_not_exist_are_text() -> None:
    assert parse("hermes", [WHOLE["hermes"]], ["other"]) == (WHOLE["hermes"], [])
    assert parse("hermes", [WHOLE["hermes"]], ["weather"])[1] == [("weather", ARGS)]


SNIPPETS = [
    *WHOLE.values(),
    *TEXTS,
    *(text for _, text in OTHERS),
    "<tool_call>",
    "</tool_call>",
    '"',
    "\\",
    " ",
    "\n",
]


@given(
    name=st.sampled_from(list(WHOLE)),
    parts=st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=8)), max_size=5),
    cuts=st.lists(st.integers(0, 2000), max_size=30),
)
def test_pieces_make_no_difference_and_nothing_is_lost(name: str, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = parse(name, [text])
    assert parse(name, pieces) == whole
    if not whole[1]:
        assert whole[0] == text


@given(name=st.sampled_from(list(WHOLE)), cut=st.integers(1, 200))
def test_no_half_of_a_marker_or_call_is_ever_shown(name: str, cut: int) -> None:
    parser = tool_parser_for(name)
    text, calls = parser.push("Hm. " + WHOLE[name][:cut] if not TOOL_FORMATS[name].bare else WHOLE[name][:cut])
    if cut < len(WHOLE[name]):
        assert text in ("", "Hm.", "Hm. ")
        assert not calls


def test_long_arguments_that_hold_the_end_marker_many_times() -> None:
    long = json.dumps({"name": "write", "arguments": {"text": '</tool_call>\\"x' * 20_000}})
    text = f"<tool_call>{long}</tool_call>"
    shown, calls = parse("hermes", [text[i : i + 16] for i in range(0, len(text), 16)])
    assert (shown, [c[0] for c in calls]) == ("", ["write"])


def constrained(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = ConstrainedParser()
    texts, names, arguments = [], [], []
    for text, deltas in [*map(parser.push, pieces), parser.finish()]:
        texts.append(text)
        for delta in deltas:
            if delta.name is not None:
                assert delta.index == len(names)
                names.append(delta.name)
                arguments.append("")
            assert delta.index == len(names) - 1
            arguments[-1] += delta.arguments
    return "".join(texts), list(zip(names, arguments, strict=True))


ANSWER = (
    '[ {"name":"a\\"b" ,"parameters" :{"x": "}] {\\"", "y": {"z": [1]}}\n} , {"name": "c","parameters": {}}, '
    '{\n "name": "d", "parameters": ' + JSON_ARGS + "} ]"
)


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12))
def test_a_constrained_answer_in_any_pieces(cuts: list[int]) -> None:
    calls = [(call["name"], call["parameters"]) for call in json.loads(ANSWER)]
    text, found = constrained([ANSWER[a:b] for a, b in pairwise(sorted({0, len(ANSWER), *cuts}))])
    assert text == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_a_constrained_answers_arguments_come_as_they_are_written() -> None:
    parser = ConstrainedParser()
    assert parser.push('[{"name": "a", "param')[1] == []
    pieces = [parser.push(piece)[1] for piece in ('eters": ', '{"x": ', "1}", "}]")]
    assert [[(d.name, d.arguments) for d in piece] for piece in pieces] == [
        [], [("a", ""), (None, '{"x": ')], [(None, "1}")], []
    ]  # fmt: skip


def test_a_constrained_answer_that_is_cut_short() -> None:
    assert constrained(['[{"na']) == ('[{"na', [])
    assert constrained(['[{"name": "a", "parameters": {"x": "lo']) == ("", [("a", '{"x": "lo')])


@pytest.mark.parametrize(
    ("template", "special", "name"),
    [
        ("… <tool_call> …", (), "hermes"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', (), "llama3"),
        ("[func_name1(params_name1=params_value1)]", (), "pythonic"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", (), "mistral"),
        ("<|tool_call|>", (), "granite"),
        ("<｜tool▁calls▁begin｜>", (), "deepseek"),
        ("", ("<s>", "[TOOL_CALLS]"), "mistral"),
        ("", (), "hermes"),
    ],
)
def test_the_format_is_that_of_the_template(template: str, special: tuple[str, ...], name: str) -> None:
    assert detect_tool_format(template, special) == name


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="choose one of hermes"):
        tool_parser_for("yaml")


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {"name": "walk", "parameters": {"$ref": "#/$defs/node", "$defs": {"node": NODE}}},
    },
]


def test_required_calls_have_a_schema_that_the_json_format_reads() -> None:
    form = tool_choice_schema(TOOLS, "required")
    schema = json.loads(form.value)
    jsonschema.Draft202012Validator.check_schema(schema)
    accepts = jsonschema.Draft202012Validator(schema).is_valid
    walk = {"name": "walk", "parameters": {"next": {"next": {}}}}
    assert accepts([walk, {"name": "now", "parameters": {}}])
    assert parse("json", [json.dumps([walk])]) == ("", [("walk", walk["parameters"])])
    for bad in ([], [{"name": "walk", "parameters": {"next": 1}}], [{"name": "other", "parameters": {}}], walk):
        assert not accepts(bad)


def test_a_named_tool_is_called_once() -> None:
    accepts = jsonschema.Draft202012Validator(json.loads(tool_choice_schema(TOOLS, {"name": "now"}).value)).is_valid
    now = {"name": "now", "parameters": {}}
    assert accepts([now])
    assert not accepts([now, now])
    assert not accepts([{"name": "walk", "parameters": {}}])
    once = json.loads(tool_choice_schema(TOOLS, "required", parallel=False).value)
    assert once["maxItems"] == 1
    with pytest.raises(InvalidRequestError, match="not among the tools"):
        tool_choice_schema(TOOLS, {"name": "gone"})
