"""Trace files of three formats, whole and broken."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell.errors import ConfigError, ForetellError
from foretell.trace import TraceFormatError, TraceRequest, Workload, read_trace

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def file_with(tmp_path, text):
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.skipif(not TRACES.exists(), reason="the traces are not on this machine")
def test_the_real_traces_are_read_whole():
    azure = read_trace(TRACES / "azure_llm_2023_conv.csv")
    assert len(azure.requests) == 19_366
    first = azure.requests[0]
    assert (first.prompt_len, first.output_len, first.arrival_seconds) == (374, 44, 0.0)
    assert azure.requests[1].arrival_seconds == pytest.approx(4.314579, abs=1e-6)
    mooncake = read_trace(TRACES / "mooncake_conversation_4000.jsonl")
    assert len(mooncake.requests) == 4000
    assert all(len(r.block_hashes) == -(-r.prompt_len // 512) for r in mooncake.requests)
    assert mooncake.token_ids(0, 32_000)[:512] == mooncake.token_ids(1, 32_000)[:512]
    assert mooncake.token_ids(0, 32_000)[512:600] != mooncake.token_ids(1, 32_000)[512:600]


def test_azure_takes_any_column_order_zones_and_unsorted_rows(tmp_path):
    text = (
        "\ufeffGeneratedTokens,Extra,TIMESTAMP,ContextTokens\r\n"
        "5,x,2024-05-10 00:00:02.5+00:00,30\r\n"
        "\r\n"
        "6,x,2024-05-10 00:00:01,0\r\n"
    )
    workload = read_trace(file_with(tmp_path, text))
    assert [(r.prompt_len, r.output_len, r.arrival_seconds) for r in workload.requests] == [(1, 6, 0.0), (30, 5, 1.5)]


def test_mooncake_without_hashes_shares_nothing(tmp_path):
    line = '{"timestamp": 1500, "input_length": 600, "output_length": 2}\n'
    workload = read_trace(file_with(tmp_path, line * 2))
    assert workload.requests[0] == TraceRequest(600, 2, 0.0)
    assert workload.token_ids(0, 5000)[:10] != workload.token_ids(1, 5000)[:10]


CONVERSATIONS = [
    {"id": "a", "conversations": [{"from": "human", "value": "12345678"}, {"from": "gpt", "value": "1234"}]},
    {"id": "b", "conversations": [{"from": "human", "value": "nobody answered"}]},
]


def test_sharegpt_lengths_with_and_without_a_tokenizer(tmp_path):
    path = file_with(tmp_path, json.dumps(CONVERSATIONS))
    (estimated,) = read_trace(path).requests
    assert (estimated.prompt_len, estimated.output_len) == (2, 1)
    (exact,) = read_trace(path, encode=lambda text: [ord(c) for c in text]).requests
    assert (exact.prompt_len, exact.output_len) == (8, 4)
    assert exact.prompt_token_ids == [ord(c) for c in "12345678"]


GOOD = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
LENGTHS = ', "input_length": 1, "output_length": 1}\n'
BROKEN = {
    "missing header": ("a,b\n1,2\n", "line 1: the header lacks TIMESTAMP, ContextTokens, GeneratedTokens"),
    "empty": ("", "line 1: the header lacks"),
    "no rows": (HEADER, "holds no request"),
    "bad time": (HEADER + "yesterday,1,2\n", "line 2: TIMESTAMP 'yesterday' is no date"),
    "bad count": (HEADER + "2023-11-16 18:15:46,1,2\n2023-11-16 18:15:46,x,2\n", "line 3: ContextTokens must be"),
    "negative": (HEADER + "2023-11-16 18:15:46,1,-2\n", "line 2: GeneratedTokens must be"),
    "huge": (HEADER + f"2023-11-16 18:15:46,{'9' * 5000},2\n", "line 2: ContextTokens must be"),
    "short row": (HEADER + "2023-11-16 18:15:46,5\n", "line 2: GeneratedTokens is missing"),
    "not json": ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"a":\n', "line 2: not JSON"),
    "no object": ("{}\n[]\n", "line 1: timestamp is missing"),
    "array line": (
        '{"timestamp": 0, "input_length": 1, "output_length": 1}\n[]\n',
        "line 2: a request must be a JSON object",
    ),
    "no length": ('{"timestamp": 0, "output_length": 1}\n', "line 1: input_length is missing"),
    "text length": ('{"timestamp": 0, "input_length": "x", "output_length": 1}\n', "line 1: input_length must be"),
    "true length": ('{"timestamp": 0, "input_length": true, "output_length": 1}\n', "line 1: input_length must be"),
    "nan time": ('{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', "line 1: timestamp must be"),
    "bad hash": (
        '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}\n',
        "line 1: hash_ids must be",
    ),
    "long integer": (
        '{"timestamp": ' + "9" * 5000 + ', "input_length": 1, "output_length": 1}\n',
        "line 1: not JSON",
    ),
    "infinite time": (
        '{"timestamp": ' + "9" * 400 + ', "input_length": 1, "output_length": 1}\n',
        "line 1: timestamp",
    ),
    "broken list": ('[\n{"conversations": \n', "line 3: not JSON"),
    "no turns": ('[{"id": 1}]', "entry 1: conversations is missing"),
    "turn without text": ('[{"conversations": [{"from": "human"}, {}]}]', "entry 1: conversations[0].value"),
    "nothing answered": ('[{"conversations": []}]', "holds no request"),
    "nested": ("[" * 100_000, "not JSON"),
    "binary": (b"\xff\xfe\x00", "not UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_with_place_and_field(name, tmp_path):
    text, message = BROKEN[name]
    with pytest.raises(TraceFormatError) as caught:
        read_trace(file_with(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert isinstance(caught.value, ForetellError)


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(TraceFormatError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="azure, mooncake, sharegpt"):
        read_trace(file_with(tmp_path, "{}"), "parquet")


def test_only_as_many_lines_as_wanted_are_read(tmp_path):
    assert len(read_trace(file_with(tmp_path, GOOD * 2 + "broken"), max_requests=2).requests) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    text=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='[]{}",:0123456789 \nabeE.-', max_size=100).map(str.encode),
        st.lists(st.text(alphabet="2023-11 6:5,.Tx", max_size=40), max_size=5).map(
            lambda rows: (HEADER + "\n".join(rows)).encode()
        ),
    )
)
def test_whatever_is_in_a_file_it_is_read_or_refused(text, tmp_path):
    try:
        workload = read_trace(file_with(tmp_path, text))
    except TraceFormatError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  (either way is right)
    else:
        assert isinstance(workload, Workload)
        assert all(r.prompt_len >= 1 and r.output_len >= 1 and r.arrival_seconds >= 0 for r in workload.requests)
