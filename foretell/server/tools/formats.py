"""The formats in use, and which of them a model's chat template teaches."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from foretell.errors import InvalidRequestError
from foretell.server.tools.bodies import EnclosedBody, ValueBody
from foretell.server.tools.calls import read_deepseek, read_json, read_json_or_xml, read_named, read_pythonic
from foretell.server.tools.parser import FormatParser, ToolFormat, ToolParser

_FORMATS: Final = (
    ToolFormat("hermes", ("<tool_call>",), lambda: EnclosedBody("</tool_call>"), read_json_or_xml),
    ToolFormat("llama3", ("<|python_tag|>",), lambda: ValueBody("{["), read_json, bare="{", between=";,"),
    ToolFormat("mistral", ("[TOOL_CALLS]",), lambda: ValueBody("[{", named=True), read_named),
    ToolFormat("pythonic", ("<|python_start|>",), lambda: ValueBody("[", quotes="\"'"), read_pythonic, bare="["),
    ToolFormat("granite", ("<|tool_call|>", "<function_call>"), lambda: ValueBody("[{"), read_json),
    ToolFormat("deepseek", ("<｜tool▁calls▁begin｜>",), lambda: EnclosedBody("<｜tool▁calls▁end｜>"), read_deepseek),
    ToolFormat("json", (), lambda: ValueBody("[{"), read_json, bare="[{"),  # what tool_choice_schema constrains to
)
TOOL_FORMATS: Final = {form.name: form for form in _FORMATS}

_SIGNS: Final = (  # a text in the template → the format; the first that is found counts
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "granite"),
    ("<function_call>", "granite"),
    ("<tool_call>", "hermes"),
    ("[func_name1(", "pythonic"),
    ("<|python_start|>", "pythonic"),
    ("<|python_tag|>", "llama3"),
    ('"parameters": dictionary', "llama3"),
)


def tool_parser_for(format_name: str, names: Collection[str] | None = None) -> ToolParser:
    """A parser for one answer. ``names``: of the tools there are; a call of another name is text. InvalidRequestError
    for a format that does not exist."""
    form = TOOL_FORMATS.get(format_name)
    if form is None:
        raise InvalidRequestError(f"tool format {format_name!r} is unknown: choose one of {', '.join(TOOL_FORMATS)}")
    return FormatParser(form, names)


def detect_tool_format(chat_template: str, special_tokens: Collection[str] = ()) -> str:
    """The format that a chat template shows the model; failing that, one whose marker the vocabulary has; failing
    that, hermes, which most models are trained on."""
    for sign, name in _SIGNS:
        if sign in chat_template:
            return name
    return next((name for sign, name in _SIGNS if sign in special_tokens), "hermes")


def marker_tokens(format_name: str) -> tuple[str, ...]:
    """Markers of a format. Where they are special tokens, the text must be decoded with them."""
    return TOOL_FORMATS[format_name].starts
