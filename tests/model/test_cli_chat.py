"""A scripted conversation with the default model, as `foretell chat` has it when stdin is no terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foretell import LLM
from foretell.cli.app import app
from tests.model import models


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    with LLM(str(models.prepare("smollm2")), dtype="float32", max_model_len=160, kv_cache_bytes=100_000_000) as llm:
        yield llm


def chat(smollm2: LLM, monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> Result:
    monkeypatch.setattr("foretell.cli.chat.open_model", lambda model, **given: nullcontext(smollm2))
    result = CliRunner().invoke(app, ["chat", "-n", "10", *options], input=script)
    assert result.exit_code == 0, result.stderr
    return result


def test_a_conversation(smollm2: LLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    result = chat(smollm2, monkeypatch, f"Say hello.\nAnd\\\ngoodbye?\n/stats\n/save {file}\n/quit\nnever seen\n")
    talk = json.loads(file.read_text())
    assert [m["role"] for m in talk["messages"]] == ["user", "assistant", "user", "assistant"]
    assert talk["messages"][2]["content"] == "And\ngoodbye?"
    for message in talk["messages"][1::2]:
        assert message["content"].strip()
        assert message["content"] in result.stdout
    stats = [line for line in result.stderr.splitlines() if line.startswith("[TTFT")]
    assert len(stats) == 2
    assert " 0 from the prefix cache" not in stats[1]  # the first turn's blocks are found again
    assert "never seen" not in result.stdout
    assert "turns          2 in" in result.stdout


def test_retry_and_undo(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    result = chat(smollm2, monkeypatch, "Name a fruit.\n/retry\n/undo\n/undo\n/retry\n/history\n")
    answers = result.stdout.strip().splitlines()
    assert len(answers) % 2 == 0
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]  # greedy: the retry says the same
    assert "(nothing to undo)" in result.stderr
    assert "(nothing to retry)" in result.stderr
    assert "(nothing said yet)" in result.stderr


def test_a_full_context_is_said_and_survived(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    too_long = "word " * 200
    filling = "word " * 100
    longest = "/set max_tokens 100\n/set min_tokens 100\n/retry\n/set min_tokens 0"
    result = chat(smollm2, monkeypatch, f"{too_long}\n/history\n{filling}\n{longest}\n/reset\nHi\n")
    assert "the context is full: with this message" in result.stderr
    assert "(nothing said yet)" in result.stderr  # the refused message is gone
    assert "(the context of 160 tokens is full" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("[TTFT")]) == 3


def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from foretell.cli.session import TextOut

    write, calls = TextOut.write, 0

    def impatient(self: TextOut, text: str) -> None:
        nonlocal calls
        calls += 1
        write(self, text)
        if calls == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextOut, "write", impatient)
    result = chat(smollm2, monkeypatch, "Tell me a story.\n/history\nThanks.\n")
    assert "(stopped; the answer so far is kept)" in result.stderr
    assert "assistant: " in result.stdout
    assert len([line for line in result.stderr.splitlines() if line.startswith("[TTFT")]) == 2


def test_a_base_model_cannot_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(models.prepare("glassllm")), dtype="float32") as llm:
        monkeypatch.setattr("foretell.cli.chat.open_model", lambda model, **given: nullcontext(llm))
        result = CliRunner().invoke(app, ["chat"], input="Hi\n")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: this model has no ")
    assert result.stderr.count("\n") == 1
