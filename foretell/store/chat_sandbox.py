"""A Jinja environment in which a hostile template can neither reach Python nor run for ever.

Jinja's sandbox closes off attributes and mutation, but not work: nested loops, doubling strings and wide
formats can still hang or fill a process. Here every loop turn, call, concatenation and output passes a meter
(chat_limits), and operations whose result can be far larger than their arguments are bounded beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, cast

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from foretell.store.chat_limits import (
    METER,
    WIDE_PERCENT,
    TemplateLimitError,
    bound_bits,
    bound_method,
    bound_product,
    bound_replace,
    bounded,
    printed_size,
)

_KEPT_FILTERS: Final = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse",
    "round", "safe", "select", "selectattr", "sort", "striptags", "title", "trim", "unique", "upper", "wordcount",
)  # fmt: skip


@pass_context
def _metered(context: Any, iterable: Any) -> Any:
    """Counts the turns of a ``for``; sequences stay sequences, for ``loop.length``."""
    if isinstance(iterable, (list, tuple, str, dict, range)):
        return _MeteredSequence(iterable)
    return _turns(iterable)


def _turns(iterable: Any) -> Iterator[Any]:
    meter = METER.get()
    for item in iterable:
        meter.step()
        yield item


class _MeteredSequence:
    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return _turns(self.items)


@pass_context
def _checked(context: Any, value: Any) -> Any:
    """Passes a freshly built string or container through, unless it is too large."""
    METER.get().step()
    bounded(printed_size(value))
    return value


@pass_context
def _emitted(context: Any, value: Any) -> Any:
    """Counts a value that is about to be written out, here or into a block."""
    METER.get().emit(printed_size(value))
    return value


@pass_context
def _written(context: Any, characters: int) -> str:
    """Counts ``characters`` of the template's own text."""
    METER.get().emit(characters)
    return ""


class _Instrument(NodeTransformer):
    """Puts the meter's filters into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja2's naming)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_metered")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        text = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        children = [
            child if isinstance(child, nodes.TemplateData) else _filter(child, "_emitted") for child in node.nodes
        ]
        node.nodes = [_filter(nodes.Const(text, lineno=node.lineno), "_written"), *children]
        return node

    def _check(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Concat):
            node.nodes = [_filter(child, "_checked") for child in node.nodes]
        return _filter(node, "_checked")

    visit_Concat = visit_List = visit_Dict = _check  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._check(node) if node.ctx == "load" else node  # `for a, b in …` stores into a tuple


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, [], [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class SandboxedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of every chat template: Hugging Face's options and helpers, metered."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        guarded: dict[str, Callable[..., Any]] = {
            "tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent, "string": _string,
            "format": _format, "sum": _sum,
            "_metered": _metered, "_checked": _checked, "_emitted": _emitted, "_written": _written,
        }  # fmt: skip
        self.filters = {name: self.filters[name] for name in _KEPT_FILTERS} | guarded
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def compile_metered(self, source: str) -> Any:
        """Source text → a template object whose work is metered. Raises jinja2.TemplateSyntaxError."""
        tree = _Instrument().visit(self.parse(source))
        return self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's str.format, with its width bounded before it runs."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None
        formats = safe

        def bounded_format(*args: Any, **kwargs: Any) -> str:
            bound_method(value.__self__, value.__name__, (*args, *kwargs.values()))
            return formats(*args, **kwargs)

        return bounded_format

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        METER.get().step()
        if operator == "*":
            bound_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bound_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            _bound_percent(left, right)
        elif operator == "+" and isinstance(left, (list, tuple, str)):
            size = len(left) + (len(right) if isinstance(right, (list, tuple, str)) else 0)
            bounded(size if isinstance(left, str) else size * 16)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        METER.get().step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            bound_method(owner, name, args)
        return super().call(__context, __obj, *args, **kwargs)


# --- filters and helpers ---------------------------------------------------------------------------------


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's: plain JSON, not the HTML-safe kind that Jinja writes."""
    bounded(printed_size(value) + min(indent or 0, 16))
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateLimitError("it indents JSON by more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bound_percent(text: str, values: Any) -> None:
    if WIDE_PERCENT.search(text):
        raise TemplateLimitError("it formats with a large or computed width")
    bounded(len(text) + text.count("%") * printed_size(values))


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    """``"%s-%s" | format(a, b)``."""
    text, values = str(value), kwargs or args
    _bound_percent(text, values)
    return text % values


def _sum(value: Any, attribute: str | int | None = None, start: float = 0) -> float:
    """Of numbers; what else Python can add up grows without bound."""
    items = [item[attribute] if attribute is not None else item for item in _turns(value)]
    if not all(isinstance(number, (int, float)) for number in [start, *items]):
        raise TemplateRuntimeError("sum takes numbers alone")
    return sum(items, start)


def _string(value: Any) -> str:
    bounded(printed_size(value))
    return str(value)


def _join(value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = list(_turns(value))
    if attribute is not None:
        items = [item[attribute] if isinstance(item, Mapping) else "" for item in items]
    bounded(printed_size(items) + len(str(d)) * len(items))
    return str(d).join(str(item) for item in items)


def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(s)
    bound_replace(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """As Jinja's: every line but the first is indented, blank ones only when ``blank``."""
    text = str(s)
    pad = width if isinstance(width, str) else " " * min(int(width), 64)
    bounded(len(text) + text.count("\n") * len(pad))
    lines = text.splitlines() or [""]
    padded = [pad + line if (number or first) and (line or blank) else line for number, line in enumerate(lines)]
    return "\n".join(padded) + ("\n" if text.endswith("\n") and blank else "")


def _raise_exception(message: str) -> None:
    raise TemplateRuntimeError(str(message)[:500])


def _strftime_now(format: str) -> str:
    if len(format) > 100 or WIDE_PERCENT.search(format):
        raise TemplateLimitError("it formats a date with a large width")
    return datetime.now().strftime(format)
