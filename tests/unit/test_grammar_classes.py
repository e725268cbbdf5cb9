r"""\d and \w mean ASCII, in expressions and in schemas' patterns; escapes stay what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.core.structured import StructuredOutput
from foretell.grammar.compiler import GrammarCompiler
from foretell.grammar.text import ascii_classes
from tests.unit.test_grammar import byte_level, walk


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(byte_level, 300)
    yield made
    made.close()


@pytest.mark.parametrize(
    "pattern", [r"\d{3}", r"\w{3}", r"[\d.]{3}", r"[a\W]{3}", r"[^\D]{3}", r"\\d{2}", r"\\\d{2}"]
)
@pytest.mark.parametrize("in_schema", [False, True])
def test_every_walk_matches_in_ascii(compiler: GrammarCompiler, pattern: str, in_schema: bool) -> None:
    schema = {"type": "string", "pattern": f"^{pattern}$"}
    form = StructuredOutput.json_schema(schema) if in_schema else StructuredOutput.regex(pattern)
    tokenizer = byte_level()
    for seed in range(30):
        ids = walk(compiler.matcher(form), Random(seed))
        text = tokenizer.decode(ids)
        if in_schema:
            text = json.loads(text, strict=False)
        assert re.fullmatch(pattern, text, re.ASCII), (text, ids)


@given(st.text(alphabet=r"\dDwWs]^.-ab01é ", max_size=12))
def test_python_reads_the_rewritten_expression_as_the_ascii_one(pattern: str) -> None:
    """Nothing else has changed. Without brackets of its own: Python knows none within others."""
    try:
        wanted = re.compile(pattern, re.ASCII)
    except re.error:
        return
    rewritten = re.compile(ascii_classes(pattern), re.ASCII)
    for text in ("0", "a", "_", "é", "٣", "\\", "d", "ab01", "\\d", " "):
        assert bool(wanted.fullmatch(text)) == bool(rewritten.fullmatch(text)), (pattern, text)
