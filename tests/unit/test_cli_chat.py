"""The conversation's commands and its line reader, without a model behind them."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from foretell.cli.chat import converse, read_lines
from foretell.cli.chat_commands import COMMANDS, run_command
from foretell.cli.chat_session import ChatSession
from foretell.errors import InvalidRequestError


@pytest.fixture
def session() -> ChatSession:
    nobody: Any = None  # no command here asks the model anything
    talk = ChatSession(nobody, {"temperature": 0.0, "max_tokens": 8}, "be brief")
    talk.messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    return talk


def lines_of(monkeypatch: pytest.MonkeyPatch, data: bytes) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return list(read_lines())


def test_lines_continue_after_a_backslash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(monkeypatch, b"a\\\nb\\\nc\nd\r\n\ne\\") == ["a\nb\nc", "d", "", "e"]


def test_lines_must_be_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="line 2"):
        lines_of(monkeypatch, "grüß\n".encode() + b"\xc3(\n")


def test_undo_takes_back_question_and_answer(session: ChatSession) -> None:
    assert run_command(session, "/undo")
    assert [m["content"] for m in session.messages] == ["one", "1"]
    assert session.undo() == "one"
    assert session.undo() is None
    assert session.messages == []


@dataclass(slots=True)
class Answering(ChatSession):
    """A conversation whose model says ``answer``, or refuses when there is none."""

    answer: str = ""

    def ask(self, text: str) -> None:
        if self.answer:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": self.answer}]


@pytest.mark.parametrize(("answer", "then"), [("two!", "two!"), ("", "2")])
def test_a_retry_that_comes_to_nothing_keeps_what_was_there(session: ChatSession, answer: str, then: str) -> None:
    talk = Answering(session.llm, {}, messages=list(session.messages), answer=answer)
    run_command(talk, "/retry")
    assert [m["content"] for m in talk.messages] == ["one", "1", "two", then]


def test_reset_keeps_the_system_message(session: ChatSession) -> None:
    run_command(session, "/reset")
    assert session.conversation() == [{"role": "system", "content": "be brief"}]
    run_command(session, "/system")
    assert session.conversation() == []
    run_command(session, "/system Answer in French, please.")
    assert session.system == "Answer in French, please."


def test_set_checks_before_it_changes(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("/set temperature 0.7", "/set top_k 5", "/set stop END", "/set max_tokens default"):
        run_command(session, line)
    assert session.params == {"temperature": 0.7, "top_k": 5, "stop": ["END"]}
    before = dict(session.params)
    capsys.readouterr()
    for line in ("/set temperature -1", "/set top_k many", "/set n 3", "/set temperature", "/set", "/set top_p nan"):
        assert run_command(session, line)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert session.params == before


def test_params_marks_what_was_given(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(session, "/params")
    shown = capsys.readouterr().out
    assert " * temperature" in shown
    assert "   top_p" in shown


def test_save_and_load(session: ChatSession, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    run_command(session, f"/save {file}")
    other = ChatSession(session.llm, {})
    run_command(other, f"/load {file}")
    assert other.conversation() == session.conversation()
    assert other.params == session.params


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"messages": 3}', b'{"messages": [{"role": "root", "content": "x"}]}', b"\xff\xfe",
     b'{"messages": [{"role": "user", "content": 5}]}', b'{"messages": [], "params": {"temperature": -5}}',
     b'{"messages": [], "params": {"stop": 5}}', b'{"messages": [], "params": {"temperature": "hot"}}'],
)  # fmt: skip
def test_a_bad_file_changes_nothing(
    session: ChatSession, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(content)
    before = (list(session.messages), session.system, dict(session.params))
    for line in (f"/load {file}", "/load", f"/load {tmp_path / 'none'}", f"/load {tmp_path}", f"/save {tmp_path}"):
        assert run_command(session, line)
        assert capsys.readouterr().err.startswith("error: ")
    assert (session.messages, session.system, session.params) == before


def test_history_shows_control_characters(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.messages[-1]["content"] = "\x1b[31mred"
    run_command(session, "/history")
    assert capsys.readouterr().out.splitlines() == [
        "system: be brief", "user: one", "assistant: 1", "user: two", "assistant: \\x1b[31mred",
    ]  # fmt: skip


def test_help_lists_every_command(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(session, "/help")
    shown = capsys.readouterr().out
    assert all(f"/{name}" in shown for name in COMMANDS)


def test_unknown_commands_and_leaving(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(session, "/bogus now")
    assert "/bogus" in capsys.readouterr().err
    assert run_command(session, "/")
    converse(session, iter(["", "  ", "/undo", "/quit", "/undo"]))
    assert len(session.messages) == 2
    assert json.dumps(session.messages)
