"""Answers as scripts, and every way to cut them into deltas."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from foretell.server.chat import ToolCallDelta

Segment = tuple[str, ...]  # ("text", words) or ("call", name, arguments)
Push = tuple[str, tuple[ToolCallDelta, ...]]

_WORDS = st.text(alphabet=' \n\tab{}"é🙂', max_size=12)
_ARGUMENTS = st.sampled_from(["", "{}", '{"city": "Paris"}', '{"a": [1, 2, {"b": "\\u00e9 🙂"}]}', '{"n": 1.5}'])
SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("text"), _WORDS),
        st.tuples(st.just("call"), st.sampled_from(["get_weather", "f"]), _ARGUMENTS),
    ),
    max_size=6,
)


def expected(script: list[Segment]) -> list[Segment]:
    """The blocks a script comes to: neighbouring texts are one, white space beside a call is none."""
    blocks: list[Segment] = []
    for segment in script:
        if segment[0] == "text" and blocks and blocks[-1][0] == "text":
            blocks[-1] = ("text", blocks[-1][1] + segment[1])
        else:
            blocks.append(segment)
    if all(block[0] == "text" for block in blocks):
        return blocks or [("text", "")]
    return [block for block in blocks if block[0] == "call" or block[1].strip()]


@st.composite
def pushes(draw: Any, script: list[Segment]) -> list[Push]:
    """The script cut anywhere; a push holds text, or growth of calls, or text and then calls."""
    atoms: list[Push] = []
    index = -1
    for segment in script:
        if segment[0] == "text":
            atoms += [(piece, ()) for piece in draw(_cuts(segment[1]))]
            continue
        index += 1
        atoms.append(("", (ToolCallDelta(index, id=f"call_{index}", name=segment[1]),)))
        atoms += [("", (ToolCallDelta(index, arguments=piece),)) for piece in draw(_cuts(segment[2]))]
    joined: list[Push] = []
    for text, calls in atoms:
        if joined and draw(st.booleans()) and (not text or not joined[-1][1]):
            joined[-1] = (joined[-1][0] + text, joined[-1][1] + calls)
        else:
            joined.append((text, calls))
    return joined


@st.composite
def _cuts(draw: Any, text: str) -> list[str]:
    at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
