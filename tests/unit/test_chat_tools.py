# ruff: noqa: E501 (templates keep their own lines)
"""Conversations with tools: rendered as transformers renders them, and what a template writes is read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foretell.server.tools import detect_tool_format, tool_parser_for
from foretell.store.chat_template import ChatTemplate
from tests.unit.test_tokenizer_chat import SPECIAL, TOOLS, theirs

ARGS = {"city": "Zürich \"x\" <b> 'q'", "n": [1, None, 2.5], "deep": {"ok": True}}

# in the manner of the models that are trained with each format
HERMES = """{%- if tools %}{{ '<|im_start|>system\n' }}# Tools
{%- for tool in tools %}{{ "\n" }}{{ tool | tojson }}{% endfor %}
For each call return <tool_call>\n{"name": <name>, "arguments": <args>}\n</tool_call>{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if message.content %}{{ '\n' + message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}{% if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' }}{{ tool_call.name }}{{ '", "arguments": ' }}
{{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}{% if tools is not none %}{{ 'Respond as {"name": function name, "parameters": dictionary of argument name and its value}.\n' }}
{%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}
{%- for message in messages %}{% if 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{ raise_exception('one tool call at once') }}{% endif %}
{%- set call = message.tool_calls[0].function %}{{ '<|start|>assistant\n\n{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|eot|>' }}
{%- elif message.role == 'tool' or message.role == 'ipython' %}{{ '<|start|>ipython\n\n' }}{% if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}{{ '<|eot|>' }}
{%- else %}{{ '<|start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"""

MISTRAL = """{%- set user_messages = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}
{%- for message in messages %}{% if message['role'] == 'user' %}{% if tools and message == user_messages[-1] %}{{ '[AVAILABLE_TOOLS] [' }}
{%- for tool in tools %}{% set tool = tool.function %}{{ '{"type": "function", "function": {' }}
{%- for key, value in tool.items() if key != 'return' %}{% if value is string %}{{ '"' + key + '": "' + value + '"' }}{% else %}{{ '"' + key + '": ' + value | tojson }}{% endif %}{% if not loop.last %}, {% endif %}{% endfor %}
{{- '}}' }}{% if not loop.last %}, {% else %}]{% endif %}{% endfor %}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{ '[TOOL_CALLS] [' }}
{%- for tool_call in message.tool_calls %}{% set out = tool_call.function | tojson %}{{ out[:-1] }}{% if tool_call.id is undefined or tool_call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- ', "id": "' + tool_call.id + '"}' }}{% if not loop.last %}, {% else %}{{ ']' + eos_token }}{% endif %}{% endfor %}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"""

TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL}


def talk(arguments: Any, calls: int) -> list[dict[str, Any]]:
    def call(i: int) -> dict[str, Any]:
        return {"id": f"call0000{i}", "type": "function", "function": {"name": "get", "arguments": arguments}}

    return [
        {"role": "user", "content": "Weather? "},
        {"role": "assistant", "content": "", "tool_calls": [call(i) for i in range(calls)]},
        *(
            {"role": "tool", "tool_call_id": f"call0000{i}", "name": "get", "content": '{"t": 7}'}
            for i in range(calls)
        ),
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "Thanks."},
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("arguments", [ARGS, json.dumps(ARGS)], ids=["object", "text"])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("calls", [1, 2])
def test_tool_calls_and_results_render_as_transformers_renders_them(
    name: str, arguments: Any, tools: Any, calls: int
) -> None:
    messages = talk(arguments, 1 if name == "llama3" else calls)
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    for prompt in (True, False):
        ours = template.render(messages, tools=tools, add_generation_prompt=prompt)
        assert ours == theirs(TEMPLATES[name], messages, tools, prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_as_its_template_writes_it_is_read_back(name: str) -> None:
    """The template is how the model saw calls in training: its own words are what the parser has to read."""
    source = TEMPLATES[name]
    assert detect_tool_format(source) == name
    rendered = ChatTemplate(source, SPECIAL).render(talk(ARGS, 1)[:2], add_generation_prompt=False)
    answer = rendered.split({"hermes": "assistant\n", "llama3": "assistant\n\n", "mistral": "[/INST]"}[name])[-1]
    for end in ("<|im_end|>\n", "<|eot|>", "</s>"):
        answer = answer.removesuffix(end)
    parser = tool_parser_for(name, ["get"])
    text, calls = parser.push(answer)
    rest, more = parser.finish()
    assert text + rest == ""
    assert [(c.name, json.loads(c.arguments)) for c in [*calls, *more]] == [("get", ARGS)]
