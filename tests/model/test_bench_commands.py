"""`foretell bench` on a tiny model of random weights: a config.json is all there is."""

import json

import pytest
from typer.testing import CliRunner

from foretell.cli.bench import bench_app
from foretell.cost import Hardware

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The machine's rates are not what is tested."""
    fixed = Hardware(2, 1e10, {"float32": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr("foretell.benchmark.setup.measure_hardware", lambda **_: fixed)


def bench(*arguments, code=0):
    result = CliRunner().invoke(bench_app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def run(command, model, *arguments):
    common = ("--load-format", "dummy", "--kv-cache-bytes", "4MiB", "--kernels", "reference")
    output = bench(command, model, *common, *arguments).stdout
    lines = output.rstrip().splitlines()
    assert sum(line.startswith("{") for line in lines) == 1
    return json.loads(lines[-1]), output


def test_offline_prints_theory_measurement_and_one_json_line(model, tmp_path):
    file = tmp_path / "out.json"
    result, text = run(
        "offline", model, "--num-requests", 3, "--input-len", "5-20", "--output-len", 4, "--repeat", 2, "--json", file
    )
    assert json.loads(file.read_text()) == result
    assert text.index("floor:") < text.index("× floor") < text.index("steps of the last run")
    assert result["requests"] == 3
    assert result["output_tokens"] == 12
    assert len(result["walls_seconds"]) == len(result["first_token_walls_seconds"]) == 2
    expected = 1e3 * (result["wall_seconds"] - result["first_token_wall_seconds"]) / 3
    assert result["ms_per_decode_step"] == pytest.approx(expected, rel=1e-3)
    assert result["output_tokens_per_second"] == pytest.approx(12 / result["wall_seconds"], rel=1e-3)
    assert sum(p["tokens"] for p in result["phases"].values()) == result["prompt_tokens"] + 12 - 3
    assert 0 < result["floor_wall_seconds"] < result["wall_seconds"]
    assert result["cached_prompt_tokens"] == 0
    linear = 2 * (3 * 32 * 32 + 3 * 32 * 64) + 300 * 32
    assert result["weight_bytes_read_per_step"] == 4 * linear  # the reference kernels widen to float32


def test_the_floor_moves_when_the_machine_turns_out_faster(model, monkeypatch):
    slow, fast = (Hardware(2, rate, {"float32": 1e11, "bfloat16": 1e11}) for rate in (1e9, 4e9))
    monkeypatch.setattr("foretell.benchmark.setup.measure_hardware", lambda *, again=False: fast if again else slow)
    result, text = run("offline", model, "--num-requests", 1, "--output-len", 4, "--repeat", 1, "--warmup", 0)
    assert "the floor moves" in text
    assert result["hardware"]["read_bytes_per_second"] == 4e9
    before = float(text.split("floor: ")[1].split(" s")[0])
    assert result["floor_wall_seconds"] < before


def test_offline_with_uneven_outputs_claims_no_time_per_step(model):
    result, _ = run("offline", model, "--num-requests", 4, "--output-len", "1-6", "--repeat", 1, "--warmup", 0)
    assert result["ms_per_decode_step"] is None


def test_a_mooncake_trace_hits_the_prefix_cache_but_not_across_runs(model, tmp_path):
    trace = tmp_path / "trace.jsonl"
    entry = {"timestamp": 0, "input_length": 100, "output_length": 3, "hash_ids": [7]}
    trace.write_text("\n".join(json.dumps({**entry, "timestamp": i}) for i in range(3)))
    result, _ = run("offline", model, "--trace", trace, "--max-num-seqs", 1, "--repeat", 2)
    assert result["prefix_caching"] is True
    assert result["cached_prompt_tokens"] == 2 * 96  # the second and third share all whole blocks with the first


def test_a_named_workload_that_does_not_fit_says_so(model):
    result = bench(
        "offline", model, "--load-format", "dummy", "--kv-cache-bytes", "4MiB", "--workload", "decode-b1", code=1
    )
    assert "384 tokens" in result.stderr


def test_online_sends_when_due_and_counts_from_then(model):
    result, text = run(
        "online", model, "--rate", 50, "--num-requests", 12, "--input-len", "5-20", "--output-len", 5,
        "--slo", "ttft=1000s,tpot=0ms",
    )  # fmt: skip
    measured = result["measured"]["mixed"]
    assert measured["requests"] == 12
    assert measured["failed"] == 0
    assert measured["output_tokens"] == 60
    assert measured["itl_seconds"]["count"] == 48
    assert measured["good_share"] == 0  # no token takes no time
    assert measured["ttft_seconds"]["p50"] > measured["queue_seconds"]["p50"] >= 0
    assert result["generator_lateness_seconds"]["mixed"]["count"] == 12
    assert result["floor"]["mixed"]["output_tokens"] == 60
    assert "TTFT, by percentile" in text
    assert "trade-off" in text


def test_online_compares_policies_on_the_same_arrivals(model):
    result, text = run(
        "online", model, "--rate", 200, "--duration", 0.1, "--output-len", 3, "--input-len", 9, "--compare-policies",
        "--burstiness", 0.5, "--repeat", 2,
    )  # fmt: skip
    reports = result["measured"]
    assert set(reports) == {"prefill-first", "decode-first", "mixed"}
    assert {r["requests"] for r in reports.values()} == {2 * result["requests"]}
    assert "most output" in text


def test_online_in_virtual_time_needs_no_weights(model):
    options = ("--rate", 5, "--num-requests", 40, "--compare-policies", "--slo", "tpot=0ms")
    result, text = run("online", model, "--virtual", *options)
    assert text.count("(0 % of all)") == 3
    assert {r["output_tokens"] for r in result["virtual"].values()} == {40 * 128}
    assert "virtual time" in text


def test_online_keeps_a_traces_times(model, tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:4{i}.0,10,2" for i in range(5)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    result, text = run("online", model, "--trace", trace, "--time-scale", 0.05, "--virtual")
    assert "over 0.200 s" in text
    assert result["requests"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("offline", "--workload", "nope"), "decode-b1"),
        (("offline", "--workload", "decode-b1", "--trace", "x"), "give one of them"),
        (("offline", "--trace", "/no/such/file"), "no trace file"),
        (("offline", "--input-len", "5-2"), "no length"),
        (("online", "--rate", "0"), "must be above 0"),
        (("online", "--rate", "1", "--burstiness", "-1"), "must be above 0"),
        (("online", "--duration", "inf", "--rate", "2"), "finite"),
        (("online", "--slo", "ttft=soon"), "no list of objectives"),
        (("offline", "--json", "/no/such/folder/x"), "cannot be written"),
        # what would change nothing is refused, not ignored
        (("offline", "--workload", "cpu-16", "--input-len", "5"), "--max-input-len"),
        (("offline", "--trace-format", "azure"), "--trace"),
        (("online", "--rate", "2", "--time-scale", "0.5"), "stretches"),
        (("online", "--virtual", "--tp", "2"), "--virtual"),
        (("online", "--virtual", "--repeat", "2"), "--virtual"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(arguments, message):
    command, *rest = arguments
    result = bench(command, "no-such-model", *rest, code=1)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
