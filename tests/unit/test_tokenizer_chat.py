# ruff: noqa: E501 (templates keep their own lines)
"""Chat templates: rendered as transformers renders them, and harmless when they mean harm."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest

from foretell.errors import ForetellError, InvalidRequestError, ModelFormatError
from foretell.store import chat_limits
from foretell.store.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Grüße & <b>héllo</b> 🙂\n\nnew  line "},
    {"role": "assistant", "content": "Ja."},
    {"role": "user", "content": "2 + 2?"},
]
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Ä 'quoted' \"x\" <tag>",
     "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": [1, None, True]}}}}}
]  # fmt: skip

TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "blocks and trimming": """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
    {# a comment #}
{% for m in rest %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
[{{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }}] {{ m.role | upper }}: {{ m.content | trim }}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}<turn>{% endif -%}
""",
    "tools": """{% if tools %}{{ tools | tojson }}|{{ tools | tojson(indent=4) }}
{%- for tool in tools %}{{ tool.function.name ~ ': ' ~ tool['function'].parameters | tojson }}{% endfor %}
{% else %}none{% endif %}{{ messages | length }}{{ documents is none }}""",
    "namespace and control": """{% set ns = namespace(found=false, n=0, list=[]) %}
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% set ns.n = ns.n + 1 %}{% set ns.list = ns.list + [m.content | length] %}
{% if ns.n == 2 %}{% break %}{% endif %}{{ m.content | replace('l', 'L') | indent(2) }}
{% endfor %}{{ ns.n }} {{ ns.list | join(', ') }} {{ range(3) | list }} {{ ns.list[::-1] }}""",
    "macros and blocks": """{% macro say(role, text='') %}<{{ role }}>{{ text.strip() }}{{ caller() if caller }}</{{ role }}>{% endmacro %}
{% set body %}{% for m in messages %}{{ say(m.role, m.content) }}{% endfor %}{% endset %}{{ body | length }}{{ body }}
{% call say('x') %}inner{% endcall %}{% filter upper %}loud{% endfilter %}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "types": """{{ 1 / 2 }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 'a' * 3 }} {{ '%s-%05.1f' % ('x', 2.5) }} {{ '{:>4}'.format(7) }}
{{ undefined_thing }}{{ undefined_thing is defined }} {{ none }} {{ {'a': [1, (2, 3)]} }} {{ messages[0].keys() | list }}
{{ messages[0] | items | list }} {{ 'a,b'.split(',') }} {{ ['x', 'y'] | map('upper') | join }} {{ 'abc'[1:] }}
{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }};{% endfor %}{% for c in 'hé' %}{{ c }}.{% else %}no{% endfor %}
{% for x in [] %}{% else %}empty{% endfor %}{% for k, v in {'p': 1}.items() %}{{ k }}={{ v }}{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }} {{ 'x' in 'xyz' }}
{{ "tab\\there" }} {{ messages[-1]['content'].startswith('2') }} {{ [3, 1, 2] | sort | first }} {{ true and not false }}""",
    "sums and formats": """{{ '%s is %05.1f' | format('x', 2.5) }} {{ '%(a)s' | format(a='ü') }} {{ [1, 2.5] | sum }}
{{ [{'n': 3}, {'n': 4}] | sum(attribute='n', start=10) }} {{ [] | sum }}""",
    "recursion": """{% for item in [{'n': 1, 'c': [{'n': 2, 'c': []}]}] recursive %}{{ item.n }}({{ loop(item.c) }}){{ loop.depth }}{% endfor %}
{% for i in range(4) %}{{ loop.cycle('a', 'b') }}{{ loop.nextitem }}{{ loop.previtem }}{{ loop.revindex }}{% endfor %}""",
}


def theirs(source: str, messages: Sequence[Any], tools: Any, add_generation_prompt: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt, **SPECIAL}
    rendered = render_jinja_template(conversations=[list(messages)], chat_template=source, **options)[0]
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("messages", [TALK, TALK[1:2]], ids=["talk", "one"])
def test_rendered_as_transformers_renders(
    name: str, add_generation_prompt: bool, tools: Any, messages: list[dict[str, Any]]
) -> None:
    expected = theirs(TEMPLATES[name], messages, tools, add_generation_prompt)
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt) == expected


def test_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ strftime_now('%Y-%m') }}"
    assert ChatTemplate(source, {}).render(TALK) == theirs(source, TALK, None, False) == time.strftime("%Y-%m")


def test_extra_variables_reach_the_template() -> None:
    assert ChatTemplate("{{ enable_thinking }}", {}).render(TALK, enable_thinking=False) == "False"


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('Only user, please\nline two') }}", {})
    with pytest.raises(InvalidRequestError, match=r"refuses these messages: Only user, please$"):
        template.render(TALK)


@pytest.mark.parametrize(
    "messages", [[], "hi", [{}], [{"content": "x"}], [{"role": 3}], ["x"], None, {"role": "user"}]
)
def test_what_are_no_messages(messages: Any) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate("x", {}).render(messages)


@pytest.mark.parametrize("content", [None, 3, ["part"]])
def test_contents_a_template_cannot_take(content: Any) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate("{{ 'a' + messages[0].content }}", {}).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{", "{% include 'x", "{{ x | nofilter }}", "(" * 9 + "{{" + "(" * 5000]
)
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(ModelFormatError, match="no valid Jinja"):
        ChatTemplate(source, {}).render(TALK)


HOSTILE = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "wide output": "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "wide text": "{% for a in range(99999) %}" + "x" * 5000 + "{% endfor %}",
    "text hidden in a block": "{% set b %}{% for a in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}",
    "text hidden in a macro": "{% macro m() %}{% for a in range(99999) %}" + "x" * 5000
    + "{% endfor %}{% endmacro %}{{ m() | length }}",
    "doubling": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by plus": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling by replace": "{% set n = namespace(s='xx') %}{% for a in range(99) %}"
    "{% set n.s = n.s | replace('x', 'xx') %}{% endfor %}",
    "doubling by method": "{% set n = namespace(s='xx') %}{% for a in range(99) %}"
    "{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}",
    "doubling by join": "{% set n = namespace(s='xx') %}{% for a in range(99) %}"
    "{% set n.s = [n.s, n.s] | join(n.s) %}{% endfor %}",
    "doubling by str.join": "{% set n = namespace(s='xx') %}{% for a in range(99) %}"
    "{% set n.s = n.s.join([n.s, n.s]) %}{% endfor %}",
    "doubling a list": "{% set n = namespace(s=[1]) %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "nested list": "{% set n = namespace(s=[1]) %}{% for a in range(99) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "nested dict": "{% set n = namespace(s=1) %}{% for a in range(99) %}{% set n.s = {'a': n.s, 'b': n.s} %}"
    "{% endfor %}{{ n.s | tojson }}",
    "nested tuple": "{% set n = namespace(s=1) %}{% for a in range(99) %}{% set n.s = (n.s, n.s) %}{% endfor %}",
    "repeat": "{{ 'x' * 10 ** 12 }}",
    "repeat the other way": "{{ (10 ** 12) * 'x' }}",
    "repeat a list": "{{ [1] * 10 ** 12 }}",
    "power": "{{ 10 ** 99999 }}",
    "growing product": "{% set n = namespace(x=9) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent filter": "{{ '%1000000000d' | format(1) }}",
    "percent star filter": "{{ '%*d' | format(1000000000, 1) }}",
    "sum of lists": "{% set n = namespace(s=[1]) %}{% for a in range(99) %}{% set n.s = [n.s, n.s] | sum(start=[]) %}"
    "{% endfor %}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "nested format width": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "ljust": "{{ 'x'.ljust(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(1000000) }}",
    "center filter": "{{ 'x' | center(1000000000) }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "wide range": "{{ range(1000000000) | list }}",
    "json indent": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "self": "{% block a %}{{ self.a() }}{% endblock %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format attribute": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{a}'.format_map({'a': 1}) }}",
    "mutation": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "translate": "{{ 'xxxx'.translate({120: 'y' * 100000}) }}",
    "own meter": "{{ 'a' | _metered | list }}{% for a in range(99999) %}{{ 'x' * 100000 | _emitted }}{% endfor %}",
    "shadowed filters": "{% set _metered = 1 %}{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "deep value": "{% set n = namespace(s=1) %}{% for a in range(99999) %}{% set n.s = [n.s] %}{% endfor %}{{ n.s }}",
    "long template": "x" * (1 << 21),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_limits, "MAX_CPU_SECONDS", 0.3)  # the limit is tested below; here it only takes time
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ForetellError) as caught:
        ChatTemplate(HOSTILE[name], SPECIAL).render(TALK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert time.process_time() - started < 8
    assert peak < 200_000_000


def test_private_attributes_are_undefined() -> None:
    source = "{{ '' | attr('__class__') }}{{ messages.__class__ }}{{ messages[0]['__class__'] }}."
    assert ChatTemplate(source, {}).render(TALK) == "."


def test_one_hostile_message_does_not_spoil_the_next() -> None:
    template = ChatTemplate(
        "{% for i in range(messages[0].n) %}{% for j in range(99999) %}{% endfor %}{% endfor %}ok", {}
    )
    with pytest.raises(InvalidRequestError):
        template.render([{"role": "user", "n": 9999}])
    assert template.render([{"role": "user", "n": 1}]) == "ok"


def test_long_honest_conversations_pass() -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(2000)]
    text = ChatTemplate(TEMPLATES["chatml"], {}).render(talk)
    assert len(text) > 2_000_000


def test_a_message_is_never_a_template() -> None:
    text = "{{ 7 * 7 }}{% for %}"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": text}]) == text
