"""Tools for models whose chat template has no place for them: told in words, in the system message.

Without it they would never hear of a request's tools, nor of the calls and results of earlier turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

Message = dict[str, Any]

_INTRODUCTION: Final = "You can use tools. Each is described as JSON:"
_AUTO: Final = (
    "To use one, answer with its name and arguments within tags:\n"
    '<tool_call>\n{"name": "the tool\'s name", "arguments": {"an argument\'s name": "its value"}}\n</tool_call>'
)
_REQUIRED: Final = 'Answer with a JSON list of calls: [{"name": "the tool\'s name", "parameters": {…}}]'


def template_knows_tools(template: str) -> bool:
    """Whether a chat template looks at the tools at all."""
    return "tools" in template


def told_in_words(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, required: bool = False
) -> list[Message]:
    """The conversation with its tools described in the system message, earlier calls written as the model would
    write them, and their results in the user's next message."""
    words: list[Message] = []
    results: Message | None = None  # the user's turn that collects them: roles take turns in many templates
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if results is None:
                results = {"role": "user", "content": text}
                words.append(results)
            else:
                results["content"] += f"\n{text}"
            continue
        if results is not None and message["role"] == "user":  # coding agents answer and go on in one turn
            results["content"] += f"\n\n{message['content']}"
            continue
        results = None
        words.append(_with_calls(message) if message.get("tool_calls") else message)
    return _with_description(words, tools, required) if tools else words


def _with_calls(message: Message) -> Message:
    calls = [_call_text(call["function"]) for call in message["tool_calls"]]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([message["content"], *calls] if message["content"] else calls)}


def _call_text(function: Mapping[str, Any]) -> str:
    called = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(called, ensure_ascii=False)}\n</tool_call>"


def _with_description(words: list[Message], tools: Sequence[Mapping[str, Any]], required: bool) -> list[Message]:
    described = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    text = "\n".join([_INTRODUCTION, *described, _REQUIRED if required else _AUTO])
    if words and words[0]["role"] == "system":
        return [{**words[0], "content": f"{words[0]['content']}\n\n{text}"}, *words[1:]]
    return [{"role": "system", "content": text}, *words]
