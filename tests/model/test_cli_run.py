"""`foretell run` on real and on random weights: text, ids, JSON, stdin, stops, logprobs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foretell import LLM
from foretell.cli.app import app
from tests.model import models

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 96,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
KEYS = {
    "prompt_token_ids", "token_ids", "text", "finish_reason", "logprobs", "ttft_seconds", "tpot_seconds",
    "engine_ttft_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "kv_bytes", "model", "dtype",
    "phases",
}  # fmt: skip


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    with LLM(str(models.prepare("smollm2")), dtype="float32", max_model_len=512, kv_cache_bytes=100_000_000) as llm:
        yield llm


@pytest.fixture
def shared(smollm2: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """Commands get the model that is loaded already: loading is tested elsewhere and takes seconds."""
    monkeypatch.setattr("foretell.cli.run.open_model", lambda model, **options: nullcontext(smollm2))
    return smollm2


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


def test_ids_in_and_out_without_a_tokenizer(cli: CliRunner, tiny: str) -> None:
    command = ["run", tiny, "1, 2 3", "--ids", "-n", "8", "--load-format", "dummy", "--kernels", "reference"]
    plain = cli.invoke(app, command)
    assert plain.exit_code == 0, plain.stderr
    ids = [int(word) for word in plain.stdout.strip().split(",")]
    assert len(ids) == 8
    assert "TTFT" in plain.stderr
    assert max(map(len, plain.stderr.splitlines())) <= 80
    seen = json.loads(cli.invoke(app, [*command, "--json", "--logprobs", "2"]).stdout)
    assert seen["token_ids"] == ids
    assert seen["prompt_token_ids"] == [1, 2, 3]
    assert [p["token_id"] for p in seen["logprobs"]] == ids
    assert seen["text"] == ""
    assert seen["kv_bytes"] == 11 * seen["kv_bytes_per_token"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["hello", "--load-format", "dummy"], "--ids"),
        (["1,2", "--ids"], "dummy"),
        (["1,96", "--ids", "--load-format", "dummy"], "96"),
        (["1,2", "--ids", "--load-format", "dummy", "--max-model-len", "300"], "256"),
        (["1,2", "--ids", "--load-format", "dummy", "--stop", "x"], "tokenizer"),
        (["1,2", "--ids", "--load-format", "dummy", "--kernels", "magic"], "magic"),
        (["1,2", "--ids", "--load-format", "dummy", "--kv-cache-bytes", "17"], "kv_cache_bytes"),
    ],
)
def test_refusals_are_one_line(cli: CliRunner, tiny: str, arguments: list[str], why: str) -> None:
    result = cli.invoke(app, ["run", tiny, *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert why in result.stderr


def test_raw_text_streams_to_stdout_and_its_cost_to_stderr(cli: CliRunner, shared: LLM) -> None:
    result = cli.invoke(app, ["run", "--raw", "The capital of France is", "-n", "8"])
    assert result.exit_code == 0
    assert "Paris" in result.stdout
    assert result.stdout.endswith("\n")
    for word in ("TTFT", "TPOT", "prefill", "decode", "KV cache", "finish", "start-up"):
        assert word in result.stderr
    assert cli.invoke(app, ["run", "--raw", "The capital of France is", "-n", "8", "-q"]).stderr == ""


def test_json_is_one_object_and_agrees_with_itself(cli: CliRunner, shared: LLM) -> None:
    result = cli.invoke(app, ["run", "Name a colour.", "-n", "6", "--json", "--logprobs", "3"])
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    seen = json.loads(result.stdout)
    assert seen.keys() >= KEYS
    assert shared.tokenizer is not None
    assert seen["text"] == shared.tokenizer.decode(seen["token_ids"])
    assert 0 < seen["engine_ttft_seconds"] <= seen["ttft_seconds"]
    assert seen["decode_tokens_per_second"] == pytest.approx(1 / seen["tpot_seconds"])
    assert len(seen["logprobs"]) == len(seen["token_ids"])
    for position, token_id in zip(seen["logprobs"], seen["token_ids"], strict=True):
        assert position["token_id"] == token_id
        assert position["rank"] == 1  # greedy
        assert position["top"][0] == {key: position[key] for key in ("token_id", "token", "logprob")}
        assert [rival["logprob"] for rival in position["top"]] == sorted(
            (rival["logprob"] for rival in position["top"]), reverse=True
        )
        assert math.fsum(math.exp(rival["logprob"]) for rival in position["top"]) <= 1 + 1e-6


def test_the_chat_template_is_applied_unless_raw(cli: CliRunner, shared: LLM) -> None:
    def prompt_ids(*arguments: str) -> list[int]:
        return list(json.loads(cli.invoke(app, ["run", *arguments, "-n", "1", "--json"]).stdout)["prompt_token_ids"])

    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    assert shared.tokenizer is not None
    assert prompt_ids("Hi", "--raw") == shared.tokenizer.encode("Hi")
    assert prompt_ids("Hi") == shared.chat_token_ids(messages[1:])
    assert prompt_ids("Hi", "--system", "Be terse.") == shared.chat_token_ids(messages)


def test_stdin_is_the_prompt(cli: CliRunner, shared: LLM) -> None:
    for arguments in (["-"], []):
        result = cli.invoke(app, ["run", *arguments, "--raw", "--json", "-n", "1"], input="Grüße, 漢字".encode())
        assert shared.tokenizer is not None
        assert json.loads(result.stdout)["prompt_token_ids"] == shared.tokenizer.encode("Grüße, 漢字")


def test_stop_strings_and_logprob_table(cli: CliRunner, shared: LLM) -> None:
    command = ["run", "--raw", "The capital of France is", "-n", "20", "--stop", "Paris", "--logprobs", "2"]
    result = cli.invoke(app, command)
    assert "Paris" not in result.stdout
    assert "stop ('Paris')" in result.stderr
    assert "likeliest" in result.stderr
    assert "rank" in result.stderr
    quiet = cli.invoke(app, [*command, "--quiet"])  # leaves the summary out, not what was asked for
    assert "likeliest" in quiet.stderr
    assert "TTFT" not in quiet.stderr


def test_seeds_repeat(cli: CliRunner, shared: LLM) -> None:
    command = ["run", "--raw", "Once upon a time", "-n", "12", "-t", "1.2", "-q", "--seed"]
    texts = [cli.invoke(app, [*command, seed]).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_too_long_a_prompt_is_one_line(cli: CliRunner, shared: LLM) -> None:
    result = cli.invoke(app, ["run", "--raw", "word " * 700])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
