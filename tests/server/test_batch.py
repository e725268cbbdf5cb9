"""Batch files: every line answered in its place, whatever stands in it, and never twice."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from foretell.cli.app import app as cli
from foretell.errors import ConfigError, UnavailableError
from foretell.server.app import create_app
from foretell.server.batch import Tally, lines_of, resume, run_batch
from foretell.server.config import ServerConfig
from tests.server.client import request
from tests.server.tiny import start_tiny, tiny_folder

LIMIT = 10_000
COMPLETION = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "ignore_eos": True, "temperature": 0}


def line(custom_id: Any, url: str = "/v1/completions", body: Any = COMPLETION, **more: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def answer_all(engine: Any, source: Path, target: Path, concurrency: int = 3, **options: Any) -> Tally:
    application = create_app(engine, ServerConfig(default_timeout_seconds=None))
    return asyncio.run(
        run_batch(application, source, target, concurrency=concurrency, max_bytes=LIMIT, **options)
    )  # fmt: skip


def read(target: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in target.read_text().splitlines()]


def test_answers_are_the_servers_in_the_order_of_the_questions(tiny: Any, tmp_path: Path) -> None:
    """Lengths differ, so that later ones end first; each answer equals what the route says to the same body."""
    source, target = tmp_path / "in", tmp_path / "out"
    bodies = [COMPLETION | {"prompt": f"{i}", "max_tokens": 20 - i} for i in range(20)]
    lines = [line(f"id-{i}", body=body) for i, body in enumerate(bodies)]
    lines.append(line("chat", "/v1/chat/completions", CHAT))
    respond = {"input": "hi", "max_output_tokens": 3, "ignore_eos": True, "temperature": 0}
    lines.append(line("respond", "/v1/responses", respond))
    embed = {"input": "hello"}
    lines.append(line("embed", "/v1/embeddings", embed))
    source.write_text("\n\n".join(lines))
    tally = answer_all(tiny, source, target)
    answers = read(target)
    assert [a["custom_id"] for a in answers] == [f"id-{i}" for i in range(20)] + ["chat", "respond", "embed"]
    assert [(a["error"], a["response"]["status_code"]) for a in answers[:-1]] == [(None, 200)] * 22
    assert len({a["id"] for a in answers}) == len({a["response"]["request_id"] for a in answers}) == 23
    for body, answer in zip(bodies, answers, strict=False):
        alone = request(tiny, "POST", "/v1/completions", json=body).json()
        assert answer["response"]["body"]["choices"] == alone["choices"]
        assert answer["response"]["body"]["usage"]["completion_tokens"] == body["max_tokens"]
    alone = request(tiny, "POST", "/v1/embeddings", json=embed)
    assert answers[-1]["response"]["status_code"] == alone.status_code == 200
    assert answers[-1]["response"]["body"] == alone.json()
    assert (tally.done, tally.output_tokens) == (23, sum(20 - i for i in range(20)) + 3 + 3)


WRONG = {
    "invalid_json": '{"custom_id": ',
    "invalid_line": "[]",
    "invalid_method": line("a", method="GET"),
    "invalid_url": line("a", "/admin/policy"),
    "line_too_long": line("a", body={"prompt": "x" * LIMIT}),
}


def test_a_wrong_line_fails_in_its_place_alone(tiny: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    more = [line(7), line("b", body=[]), line("c", body=COMPLETION | {"stream": True}), '{"custom_id": "\\ud800"}']
    source.write_text("\n".join([line("first"), *WRONG.values(), *more, line("last")]))
    tally = answer_all(tiny, source, target)
    answers = read(target)
    assert [a["error"]["code"] for a in answers[1:-1]] == [*WRONG, *["invalid_line"] * 4]
    assert [a["custom_id"] for a in answers] == ["first", None, None, "a", "a", None, None, "b", "c", None, "last"]
    assert all(a["response"] is None for a in answers[1:-1])
    assert answers[0]["response"]["status_code"] == answers[-1]["response"]["status_code"] == 200
    assert sum(tally.errors.values()) == 9


@pytest.mark.parametrize(
    "body", ['{"prompt": NaN}', '{"prompt": "\\ud800"}', '{"prompt": "x", "max_tokens": -1}', "{}"]
)
def test_what_the_route_refuses_stands_in_the_response(tiny: Any, tmp_path: Path, body: str) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(line("x").replace(json.dumps(COMPLETION), body))
    tally = answer_all(tiny, source, target)
    (answer,) = read(target)
    assert answer["error"] is None
    assert answer["response"]["status_code"] == 400
    assert "message" in answer["response"]["body"]["error"]
    assert tally.errors == {"HTTP 400": 1}


@settings(deadline=None, max_examples=12)
@given(done=st.integers(0, 6), torn=st.integers(0, 40))
def test_a_second_run_goes_on_behind_what_is_there(tiny: Any, done: int, torn: int) -> None:
    """Whatever the first run left, torn in the middle of a line or not: the result is as if it had run through,
    and what was there has not been touched."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source, target, whole = Path(folder) / "in", Path(folder) / "out", Path(folder) / "whole"
        lines = [line(f"id-{i}") for i in range(3)] + ["no json", line("e"), "", line("f")]
        source.write_text("\n".join(lines))
        answer_all(tiny, source, whole)
        kept = whole.read_bytes().splitlines(keepends=True)
        left = b"".join(kept[:done]) + (kept[done][:torn] if done < len(kept) else b"")
        target.write_bytes(left)
        tally = answer_all(tiny, source, target)
        assert tally.skipped == min(done, len(kept))
        assert tally.skipped + tally.done == 6
        assert target.read_bytes().startswith(b"".join(kept[:done]))
        assert [a["custom_id"] for a in read(target)] == ["id-0", "id-1", "id-2", None, "e", "f"]


def test_answers_to_something_else_are_not_gone_on_with(tiny: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text(line("a"))
    for other in ('{"custom_id": "b"}\n', "not json\n", '{"custom_id": "a"}\n{"custom_id": "a"}\n'):
        target.write_text(other)
        with pytest.raises(ConfigError, match="does not answer"):
            resume(source, target, LIMIT)
        assert target.read_text() == other
    answer_all(tiny, source, target, overwrite=True)
    assert [a["custom_id"] for a in read(target)] == ["a"]


def test_a_lost_engine_ends_the_run_and_leaves_no_false_answers(tmp_path: Path) -> None:
    engine = start_tiny()
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join(line(f"{i}") for i in range(30)))

    def advance(tokens: int) -> None:
        if len(read(target)) == 2:
            engine.close()

    with pytest.raises(UnavailableError, match="engine was lost"):
        answer_all(engine, source, target, concurrency=1, advance=advance)
    answers = read(target)
    assert 2 <= len(answers) < 30
    assert all(a["response"]["status_code"] == 200 for a in answers)


def test_memory_holds_a_few_lines_of_a_file(tiny: Any, tmp_path: Path) -> None:
    """What has been read ahead of what is written never exceeds the window."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join(line(f"{i}", body=COMPLETION | {"max_tokens": 1}) for i in range(60)))
    asked: list[int] = []
    ahead: list[int] = []

    class Counting:
        def __init__(self) -> None:
            self.app = create_app(tiny, ServerConfig())

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            asked.append(1)
            await self.app(scope, receive, send)

    def advance(tokens: int) -> None:
        ahead.append(len(asked) - len(ahead))

    asyncio.run(run_batch(Counting(), source, target, concurrency=2, max_bytes=LIMIT, advance=advance))  # type: ignore[arg-type]
    assert len(ahead) == 60
    assert max(ahead) <= 2 * 4


@given(st.lists(st.binary(max_size=60).filter(lambda b: b"\n" not in b), max_size=8), st.integers(1, 20))
def test_lines_are_bounded_and_whole(parts: list[bytes], limit: int) -> None:
    found = list(lines_of(io.BytesIO(b"\n".join(parts)), limit))
    assert all(len(one) <= limit + 2 for one in found)
    short = [part.strip() for part in parts if len(part) <= limit and part.strip()]
    assert [one for one in found if len(one) <= limit and one in short] == [one for one in found if one in short]
    if all(len(part) <= limit for part in parts):
        assert found == short


def test_the_command(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([line("a", body=COMPLETION | {"model": "gpt-x"}), "?", line("b")]))
    args = ["run-batch", "-i", str(source), "-o", str(target), str(tiny_folder()), "--load-format", "dummy",
            "--dtype", "float32", "--kv-cache-bytes", "4MiB", "--served-model-name", "gpt-x"]  # fmt: skip
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    assert "3 of 3 lines answered" in result.stderr
    assert "1 × invalid_json" in result.stderr
    assert [a["custom_id"] for a in read(target)] == ["a", None, "b"]
    again = CliRunner().invoke(cli, args)
    assert "3 of 3 lines are answered already" in again.stderr
    same = CliRunner().invoke(cli, ["run-batch", "-i", str(source), "-o", str(source)])
    assert same.exit_code == 1
    assert "same file" in same.stderr
    target.write_text('{"custom_id": "z"}\n')
    other = CliRunner().invoke(cli, args)
    assert other.exit_code == 1
    assert other.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "go on" not in other.stderr  # the same command would say the same
