"""The command line without a model: help, usage errors, exit codes, and what is refused before anything loads."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import foretell
from foretell.assembly import EngineOptions
from foretell.cli import bench_options, options, serve_options, units
from foretell.cli.app import app
from foretell.cli.groups import grouped
from foretell.cli.guard import guarded
from foretell.cli.run import parse_ids, split_words
from foretell.cli.session import visible
from foretell.core.params import SamplingParams
from foretell.errors import ConfigError, ForetellError, InvalidRequestError
from foretell.server.config import ServerConfig
from foretell.store import ALIASES, DEFAULT_MODEL

COMMANDS = (
    "run", "chat", "serve", "models", "inspect", "run-batch", "calibrate", "simulate", "version", "bench offline",
    "bench online", "bench serve", "bench scaling", "plan",
)  # fmt: skip


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner(env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})


def one_line_error(result: object) -> str:
    stderr = str(getattr(result, "stderr", ""))
    assert getattr(result, "exit_code", None) == 1, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert getattr(result, "stdout", None) == ""
    return stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["chat", "-h"], ["--version"], ["version"]])
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv = ['foretell', *sys.argv[1:]]\nfrom foretell.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'httpx', 'huggingface_hub', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(cli: CliRunner, command: str) -> None:
    result = cli.invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"foretell {command}" in result.stdout


def test_top_level_help_names_every_command(cli: CliRunner) -> None:
    result = cli.invoke(app, ["--help"])
    assert all(command.split()[0] in result.stdout for command in COMMANDS)


def test_version(cli: CliRunner) -> None:
    assert cli.invoke(app, ["--version"]).stdout == f"foretell {foretell.__version__}\n"
    assert "torch" in cli.invoke(app, ["version"]).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["run", "a", "b", "c"], ["run", "smollm2-135m"], ["run", "./model.gguf"],
        ["run", "hi", "--no-such-option"], ["run", "./"],
        ["run", "hi", "--dtype", "int3"], ["run", "hi", "--max-tokens", "0"], ["run", "hi", "--policy", "first-come"],
        ["run", "hi", "--raw", "--system", "x"], ["run", "hi", "--logprobs", "many"], ["inspect", "a", "b"],
        ["run", "hi", "--kv-cache-bytes", "lots"], ["run", "--ids", "1,2", "--system", "x"], ["bench", "nonsense"],
        ["bench", "online", "--duration", "nan"], ["run-batch"], ["serve", "--port", "70000"],
    ],
)  # fmt: skip
def test_usage_errors_are_one_line_that_names_the_help_and_exit_2(cli: CliRunner, arguments: list[str]) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "--help" in result.stderr


def test_a_group_of_options_is_taken_apart_and_put_together_again(cli: CliRunner) -> None:
    @dataclass(frozen=True)
    class Pair:
        left: Annotated[int, typer.Option("--left", "-l")] = 1
        right: Annotated[str, typer.Option("--right")] = "r"

    @dataclass(frozen=True)
    class Triple(Pair):
        third: bool = False

    got: list[tuple[Triple, str]] = []

    def command(group: Triple, word: str, *, more: int = 7) -> None:
        got.append((group, f"{word} {more}"))

    command.__annotations__ = {"group": Triple, "word": str, "more": int, "return": None}
    small = typer.Typer()
    small.command()(grouped(command))
    assert cli.invoke(small, ["hello"]).exit_code == 0
    assert cli.invoke(small, ["hi", "-l", "5", "--third", "--more", "8"]).exit_code == 0
    assert got == [(Triple(), "hello 7"), (Triple(5, "r", True), "hi 8")]


def test_engine_options_mean_the_same_to_every_command() -> None:
    """Groups name their fields as EngineOptions and SamplingParams do: a new option cannot be dropped on the way."""
    assert {f.name for f in fields(options.Engine)} <= {f.name for f in fields(EngineOptions)}
    assert {f.name for f in fields(bench_options.BenchEngine)} <= {f.name for f in fields(EngineOptions)}
    assert {f.name for f in fields(options.Sampling)} <= {f.name for f in fields(SamplingParams)}
    assert EngineOptions("m", **options.Engine().options()) == EngineOptions("m")
    assert EngineOptions("m", **serve_options.ServeEngine().options()) == EngineOptions("m")


def test_the_servers_options_are_its_configuration() -> None:
    limits = serve_options.Limits(timeout_seconds=5.0, max_body_bytes=7, max_n=3)
    config = ServerConfig(**serve_options.Reach(port=1, api_key=["a" * 8]).config("m"), **limits.config())
    assert (config.port, config.api_keys, config.served_model_names) == (1, ("a" * 8,), ("m",))
    assert (config.default_timeout_seconds, config.max_timeout_seconds) == (5.0, 5.0)
    assert (config.max_body_bytes, config.max_n) == (7, 3)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run", "no-such-model", "hi"], "no known model"),
        (["run", "./nowhere.gguf", "hi"], "does not exist"),
        (["run", "hi", "--top-p", "3"], "top_p"),
        (["run", "hi", "--temperature", "inf"], "temperature"),
        (["run", ""], "empty"),
        (["run", "--ids", "1,two"], "two"),
        (["run", "--ids", "-"], "empty"),
        (["run", "hi", "--offline"], "offline"),
        (["chat", "no-such-model"], "no known model"),
        (["chat", "--min-p", "2"], "min_p"),
        (["inspect", "no-such-model"], "no known model"),
        (["calibrate", "no-such-model", "--profile", "/no/such/folder/x"], "cannot be written"),
        (["serve", "--timeout-seconds", "inf"], "finite"),
        (["serve", "--hang-seconds", "5"], "less than --stall-seconds 30"),
        (["serve", "--api-key-file", "/no/such/file"], "No such file"),
        (["serve", "--api-key", ""], "API key"),  # as in --api-key "$UNSET", which must not open the server
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    cli: CliRunner, tmp_path: Path, arguments: list[str], why: str
) -> None:
    assert why in one_line_error(cli.invoke(app, arguments, env={"FORETELL_HOME": str(tmp_path)}))


def test_stdin_must_be_utf8(cli: CliRunner) -> None:
    result = cli.invoke(app, ["run", "-"], input=b"fine so far \xff")
    assert "0xff at offset 12" in one_line_error(result)


def test_inspect_json_is_one_object(cli: CliRunner, tmp_path: Path) -> None:
    from tests.unit.test_inspect_numbers import LLAMA_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    result = cli.invoke(app, ["inspect", str(tmp_path), "--json", "--dtype", "float32"])
    assert result.exit_code == 0
    seen = json.loads(result.stdout)
    assert seen["parameters"]["total"] == 8_030_261_248
    assert seen["kv_cache"]["bytes_per_token"] == 262144
    assert cli.invoke(app, ["inspect", str(tmp_path)]).exit_code == 0


def test_models_without_a_cache(cli: CliRunner, tmp_path: Path) -> None:
    result = cli.invoke(app, ["models", "--json"], env={"FORETELL_HOME": str(tmp_path)})
    listing = json.loads(result.stdout)
    assert {alias["name"] for alias in listing["aliases"]} == set(ALIASES)
    assert [alias["name"] for alias in listing["aliases"] if alias["default"]] == [DEFAULT_MODEL]
    assert not any(alias["cached"] for alias in listing["aliases"])
    assert listing["cached"] == []
    assert any("LlamaForCausalLM" in family["names"] for family in listing["architectures"])
    table = cli.invoke(app, ["models"], env={"FORETELL_HOME": str(tmp_path)})
    assert table.exit_code == 0
    assert DEFAULT_MODEL in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 100


def test_words_are_a_model_and_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_words(["hello"]) == (DEFAULT_MODEL, "hello")
    assert split_words(["org/name", "-"]) == ("org/name", "-")
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert split_words([]) == (DEFAULT_MODEL, "-")


def test_ids_are_parsed() -> None:
    assert parse_ids("1, 2 3\n[4]".replace("[", "").replace("]", "")) == [1, 2, 3, 4]
    assert parse_ids("[5,6]") == [5, 6]
    assert parse_ids(" ") == []
    for bad in ("-1", "1.5", "0x1", "one", "99999999999999999999"):
        with pytest.raises(InvalidRequestError):
            parse_ids(bad)


def ending(error: BaseException) -> int:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        guarded(command)()
    return end.value.exit_code


def test_endings(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(ForetellError("first\nsecond")) == 1
    assert capsys.readouterr().err == "error: first second\n"
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert ending(MemoryError()) == 1
    assert capsys.readouterr().err.startswith("error: out of memory")


def test_bugs_keep_their_traceback() -> None:
    def command() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        guarded(command)()


def test_a_closed_pipe_ends_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        command = [sys.executable, "-m", "foretell.cli", "models", "--json"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


def test_sizes() -> None:
    sizes = {"17": 17, "1K": 1024, "512MiB": 512 << 20, "2G": 2 << 30, "1.5GB": 1_500_000_000, "1 gib": 1 << 30}
    assert {text: units.parse_bytes(text) for text in sizes} == sizes
    for bad in ("", "-1", "lots", "1X", "1e9"):
        with pytest.raises(ConfigError):
            units.parse_bytes(bad)


def test_numbers_for_people() -> None:
    assert units.binary_bytes(23040) == "22.5 KiB"
    assert units.binary_bytes(0) == "0 B"
    assert units.flops(2_147_483_648) == "2.15 GFLOP"
    assert units.count(134_515_008) == "134.5 M"
    assert [units.seconds(s) for s in (None, 5e-6, 0.0123, 2.5)] == ["—", "5 µs", "12.3 ms", "2.50 s"]
    assert [units.tokens(n) for n in (512, 1024, 131072, 1500)] == ["512", "1k", "128k", "1,500"]
    assert [units.share(part, 1) for part in (0, 1e-6, 0.1234, 1)] == ["0 %", "<0.1 %", "12.3 %", "100 %"]
    unit = units.shared_byte_unit([1 << 30, 5 << 30])
    assert (unit.name, unit.show(5 << 30)) == ("MiB", "5,120")


def test_control_characters_are_shown_not_obeyed() -> None:
    assert visible("a\x1b[2Jb\x07\x9b\r\n\tä漢") == "a\\x1b[2Jb\\x07\\x9b\\x0d\n\tä漢"
    assert visible("plain") == "plain"
