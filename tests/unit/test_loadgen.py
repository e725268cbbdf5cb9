"""The load generator against a real server on loopback that does what each test says."""

import asyncio
import json
import os
import signal
import threading
from contextlib import closing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from foretell.benchmark.traffic import Arrivals, Traffic
from foretell.cli.app import app
from foretell.errors import ConfigError, ForetellError
from foretell.loadgen.command import Asked, with_loop
from foretell.loadgen.drive import INTERRUPTED, Driver, Pace, run_loop
from foretell.loadgen.http import HttpClient
from foretell.loadgen.interface import Interface, model_of, probe
from foretell.loadgen.prompts import WORDS, PromptMaker
from foretell.loadgen.report import finished, report_of, say_run
from foretell.loadgen.stream import EventLines, StreamReader
from foretell.loadgen.target import Target
from foretell.trace import Objectives, TraceRequest, Workload
from tests.unit.scripted_server import ScriptedServer


def workload(*arrivals, prompt_len=10, output_len=3):
    return Workload("w", "", tuple(TraceRequest(prompt_len, output_len, arrival_seconds=at) for at in arrivals))


def drive(server, work, pace=None, interface=None):
    async def main():
        chosen = interface or Interface("completions", "m")
        with closing(HttpClient(Target.parse(server.url))) as client:
            return await Driver(client, chosen, PromptMaker(work), pace or Pace(), advance=None).run()

    return run_loop(main())


# -- the loop stays open ----------------------------------------------------------------------------------


def test_no_coordinated_omission():
    """The server answers nothing until it holds every request: a generator that waited for answers would hang
    here. And what they waited counts, from the moment each was due."""
    arrivals = [i * 0.01 for i in range(20)]
    everyone = asyncio.Event()

    async def script(exchange):
        if exchange.number == len(arrivals) - 1:
            everyone.set()
        await everyone.wait()
        exchange.answer()

    with ScriptedServer(script) as server:
        run = drive(server, workload(*arrivals))
    assert len(run.sent) == len(arrivals)
    for sent, due in zip(run.sent, arrivals, strict=True):
        assert sent.kind is None
        assert sent.due == due
        assert due <= sent.sent
        assert sent.times().ttft_seconds >= arrivals[-1] - due


def test_waiting_for_room_counts():
    """All are due at 0 and only two may be under way: each begins when an earlier one has ended, and its latency
    holds that wait."""
    with ScriptedServer() as server:
        run = drive(server, workload(*[0.0] * 12), Pace(max_concurrency=2))
        assert server.most <= 2
    ends = sorted(sent.ended for sent in run.sent)
    for number, sent in enumerate(sorted(run.sent, key=lambda sent: sent.sent)[2:]):
        assert sent.due == 0
        assert sent.sent >= ends[number]
        assert sent.times().ttft_seconds >= ends[number]


def test_a_closed_loop_sends_the_next_when_the_last_is_answered():
    with ScriptedServer() as server:
        run = drive(server, workload(*[0.0] * 9), Pace(closed=True, max_concurrency=3))
        assert server.most <= 3
    assert sorted(sent.index for sent in run.sent) == list(range(9))
    assert all(sent.due > 0 for sent in run.sent[3:])
    assert run.errors() == {}
    assert run.connections <= 3


def test_a_duration_goes_round_the_workload_with_other_prompts():
    """The duration ends with the clock; here the script ends the run by Ctrl-C once it has seen enough."""

    def script(exchange):
        if exchange.number == 9:
            os.kill(os.getpid(), signal.SIGINT)
        exchange.answer()

    with ScriptedServer(script) as server:
        run = drive(server, workload(0.0, 0.0), Pace(closed=True, max_concurrency=1, duration_seconds=3600.0))
        prompts = [body["prompt"] for body in server.bodies]
    assert run.interrupted
    assert len(set(prompts)) == len(prompts) >= 10


def test_an_interrupted_run_leaves_out_what_was_open():
    def script(exchange):
        if exchange.number < 5:
            exchange.answer()
        elif exchange.number == 9:
            os.kill(os.getpid(), signal.SIGINT)

    with ScriptedServer(script) as server:
        run = drive(server, workload(*[0.0] * 10))
    assert run.interrupted
    assert [sent.kind for sent in run.sent].count(INTERRUPTED) == 5
    assert report_of(run, Objectives()).requests == len(finished(run)) == 5
    lines = []
    say_run(run, report_of(run, Objectives()), Pace(), Objectives(), lines.append)
    assert any("5 requests were still open" in line for line in lines)


def test_what_opens_and_what_closes_the_loop():
    def asked(arrivals, concurrency=None, **traffic):
        given = Asked(
            Target.parse("http://h"), Interface("completions", ""), Traffic(**traffic), arrivals,
            Pace(max_concurrency=concurrency), Objectives(),
        )  # fmt: skip
        return with_loop(given)

    assert asked(Arrivals()).arrivals.rate == 1.0
    assert not asked(Arrivals(rate=5.0), 8).pace.closed
    assert asked(Arrivals(), 8).pace.closed
    assert asked(Arrivals(rate=float("inf")), 8).pace.closed
    assert asked(Arrivals(duration_seconds=5.0), 8).pace.duration_seconds == 5.0
    assert asked(Arrivals(rate=2.0, ramp_to=4.0, duration_seconds=100.0)).traffic.num_requests >= 300
    with pytest.raises(ConfigError, match="closed loop"):
        asked(Arrivals(ramp_to=3.0), 8)
    with pytest.raises(ConfigError, match="--rate"):
        asked(Arrivals(burstiness=3.0), 8)


def test_a_trace_without_times_is_not_taken_for_one_with(tmp_path):
    """ShareGPT says what was asked, not when: such requests come at a rate, or from so many users."""
    trace = tmp_path / "talk.json"
    trace.write_text(json.dumps([{"conversations": [{"value": "How?"}, {"value": "So."}]}] * 3))

    def asked(arrivals, concurrency=None):
        given = Asked(
            Target.parse("http://h"), Interface("completions", ""), Traffic(trace=trace), arrivals,
            Pace(max_concurrency=concurrency), Objectives(),
        )  # fmt: skip
        return with_loop(given)

    assert asked(Arrivals()).arrivals.rate == 1.0
    assert asked(Arrivals(), 8).pace.closed
    assert not asked(Arrivals(rate=5.0), 8).pace.closed
    with pytest.raises(ConfigError, match="stretches"):
        asked(Arrivals(time_scale=2.0))


# -- answers and failures ---------------------------------------------------------------------------------


def cut(exchange):
    exchange.head()
    exchange.token()
    exchange.end()


def broken_off(exchange):
    exchange.head()
    exchange.token()
    exchange.writer.close()


def error_event(exchange):
    exchange.head()
    exchange.token()
    exchange.event({"error": {"message": "the engine was lost", "code": 503}})
    exchange.end()


def no_json(exchange):
    exchange.head()
    exchange.event(b"{]")
    exchange.end()


def empty(exchange):
    exchange.answer(tokens=0)


FAILURES = {
    "HTTP 429": lambda exchange: exchange.refuse(429, "the queue is full"),
    "HTTP 500": lambda exchange: exchange.refuse(500, "oh"),
    "cut short": cut,
    "disconnected": broken_off,
    "error event": error_event,
    "bad response": no_json,
    "empty": empty,
}


def test_failures_are_counted_by_kind_and_harm_nobody_else():
    scripts = [*FAILURES.values(), lambda exchange: exchange.answer()]
    with ScriptedServer(lambda exchange: scripts[exchange.number % len(scripts)](exchange)) as server:
        run = drive(server, workload(*[0.0] * 24), Pace(max_concurrency=1))
    assert run.errors() == dict.fromkeys(FAILURES, 3)
    report = report_of(run, Objectives())
    assert (report.requests, report.failed, report.output_tokens) == (24, 21, 9)
    assert next(s for s in run.sent if s.kind == "HTTP 429").detail == "the queue is full"
    assert next(s for s in run.sent if s.kind == "error event").detail == "the engine was lost"


def test_a_server_that_is_not_there():
    with ScriptedServer() as server:
        pass
    assert drive(server, workload(0.0)).errors() == {"connect": 1}


def test_a_name_that_no_resolver_takes():
    async def main():
        with closing(HttpClient(Target.parse("http://a..b"))) as client:
            await model_of(client)

    with pytest.raises(ForetellError, match="no connection to"):
        run_loop(main())


def test_a_request_has_a_time_limit_and_the_server_sees_it_leave():
    left = threading.Event()

    async def script(exchange):
        with suppress(ConnectionError):
            await exchange.reader.read()  # until the client has closed
        left.set()

    with ScriptedServer(script) as server:
        run = drive(server, workload(0.0), Pace(timeout_seconds=0.05))
        assert left.wait(30)
    assert run.errors() == {"timeout": 1}


def test_a_connection_that_closed_while_idle_is_replaced():
    """The server says keep-alive and closes: a race that is no failure of either."""

    async def script(exchange):
        exchange.answer()
        await exchange.writer.drain()
        exchange.writer.close()

    with ScriptedServer(script) as server:
        run = drive(server, workload(*[0.0] * 6), Pace(closed=True, max_concurrency=1))
    assert run.errors() == {}
    assert len(run.sent) == 6


def test_pieces_that_come_as_lists_count_as_tokens():
    """Some servers send a model's reasoning as parts of a list where OpenAI sends a text."""
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    reader = StreamReader()
    for delta in ({"role": "assistant", "content": ""}, {"content": parts}, {"content": "So."}):
        reader.push(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n", 1.0)
    assert len(reader.token_times) == 2


def test_a_body_without_a_length_ends_with_the_connection():
    def script(exchange):
        exchange.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        exchange.writer.write(b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')
        exchange.writer.close()

    with ScriptedServer(script) as server:
        run = drive(server, workload(0.0, 0.0))
    assert run.errors() == {}


# -- streams ----------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1)), st.data())
def test_events_do_not_depend_on_how_bytes_come(texts, data):
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    whole = "".join(f": comment{end}event: x{end}data: {text}{end}{end}" for text in texts).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    lines, events = EventLines(), []
    for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        events += lines.push(whole[a:b])
    assert events == [text.encode() for text in texts]


def test_an_event_without_end_is_refused():
    lines = EventLines()
    lines.push(b"x" * (16 << 20))
    with pytest.raises(ValueError, match="event of more than"):
        lines.push(b"x")


def test_only_text_is_a_token():
    reader = StreamReader()
    pieces = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "Hi"}}]},
        {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5,
                                  "prompt_tokens_details": {"cached_tokens": 4}}},
    ]  # fmt: skip
    for now, piece in enumerate(pieces):
        reader.push(b"data: " + json.dumps(piece).encode() + b"\n\n", float(now))
    assert list(reader.token_times) == [1.0, 2.0, 3.0]
    assert reader.finish_reason == "stop"
    assert reader.usage.completion_tokens == 5
    assert reader.usage.prompt_tokens_details.cached_tokens == 4


def test_the_servers_own_count_makes_tpot():
    """Six tokens in three pieces, 0.5 s apart: 1 s for the five tokens after the first."""
    from foretell.trace import RequestTimes

    times = RequestTimes(0.0, 4, [1.0, 1.5, 2.0], counted_tokens=6)
    assert times.tpot_seconds == 0.2
    assert times.num_tokens == 6
    assert RequestTimes(0.0, 4, [1.0], counted_tokens=6).tpot_seconds is None


# -- prompts and the probe --------------------------------------------------------------------------------


def test_the_probe_finds_how_long_words_are():
    async def main(url):
        with closing(HttpClient(Target.parse(url))) as client:
            return await model_of(client), await probe(client, Interface("completions", "m"))

    with ScriptedServer(models=("first", "second")) as server:
        model, probed = run_loop(main(server.url))
    assert model == "first"
    assert (probed.tokens_per_word, probed.overhead_tokens) == (2.0, 5.0)
    work = workload(0.0, prompt_len=105)
    text = PromptMaker(work, tokens_per_word=2.0, overhead_tokens=5.0).prompt(0)
    assert len(text.split()) == 50


@pytest.mark.parametrize("unknown", ["ignore_eos", "stream_options"])
def test_the_probe_leaves_out_what_the_server_does_not_know(unknown):
    def script(exchange):
        if unknown in exchange.body:
            exchange.refuse(400, f"{unknown} is not a parameter")
        else:
            exchange.answer(usage="stream_options" in exchange.body)

    async def main(url):
        with closing(HttpClient(Target.parse(url))) as client:
            return await probe(client, Interface("chat", "m"))

    with ScriptedServer(script) as server:
        probed = run_loop(main(server.url))
    assert not probed.interface.ignore_eos
    assert probed.interface.usage == (unknown == "ignore_eos")
    assert (probed.tokens_per_word is None) == (unknown == "stream_options")
    assert any("shorter than asked" in note for note in probed.notes)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (lambda exchange: exchange.refuse(401, "no key"), "HTTP 401.*no key"),
        (lambda exchange: exchange.refuse(400, "no model m"), "HTTP 400.*no model m"),
        (no_json, "no event stream"),
    ],
)
def test_a_server_that_cannot_be_measured_says_why(script, why):
    async def main(url):
        with closing(HttpClient(Target.parse(url))) as client:
            return await probe(client, Interface("chat", "m"))

    with ScriptedServer(script) as server, pytest.raises(ForetellError, match=why):
        run_loop(main(server.url))


def test_words_share_what_token_ids_share():
    """Two requests with the same first block hash have the same beginning, and only that."""
    requests = tuple(TraceRequest(96, 1, block_hashes=(7, own), block_tokens=48) for own in (1, 2))
    prompts = [PromptMaker(Workload("", "", requests)).prompt(i).split() for i in range(2)]
    assert prompts[0][:48] == prompts[1][:48]
    assert prompts[0][48:] != prompts[1][48:]
    again = PromptMaker(Workload("", "", requests)).prompt(0, variant=3).split()
    assert again[:48] != prompts[0][:48]


def test_words_are_different_and_plain():
    assert len(set(WORDS)) == len(WORDS) > 128
    assert all(word.isascii() and word.isalpha() for word in WORDS)


# -- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "host"),
    [
        ("http://127.0.0.1:8000", "POST /v1/x HTTP", "127.0.0.1:8000"),
        ("http://h/v1/", "POST /v1/x HTTP", "h"),
        ("https://h:443/api/v1", "POST /api/v1/x HTTP", "h"),
        ("http://[::1]:8000", "POST /v1/x HTTP", "[::1]:8000"),
    ],
)
def test_addresses(text, path, host):
    message = Target.parse(text, "secret").message("POST", "/v1/x", b"{}").decode()
    assert message.startswith(path)
    assert f"\r\nHost: {host}\r\n" in message
    assert "\r\nAuthorization: Bearer secret\r\n" in message
    assert message.endswith("\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "127.0.0.1:8000",
        "ftp://h",
        "http://",
        "http://h:99999",
        "http://h/ x",
        "http://h/\r\nX: y",
        "http://h?q",
        "http://user:secret@h",
    ],
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="--base-url"):
        Target.parse(text)


def test_a_key_cannot_smuggle_headers():
    with pytest.raises(ConfigError, match="key"):
        Target.parse("http://h", "a\r\nX-Admin: 1")


# -- the command ------------------------------------------------------------------------------------------


def bench(*args):
    return CliRunner().invoke(app, ["bench", "serve", *args])


def test_the_command_from_options_to_files(tmp_path):
    json_file, picture = tmp_path / "run.json", tmp_path / "run.html"
    with ScriptedServer() as server:
        result = bench(
            "--base-url", server.url, "--rate", "400", "--num-requests", "40", "--input-len", "25",
            "--output-len", "4", "--slo", "ttft=60s,e2e=0.0001ms", "--json", str(json_file), "--records",
            "--plot", str(picture), "--extra-body", '{"top_p": 0.5}', "--endpoint", "chat",
        )  # fmt: skip
        bodies = server.bodies
    assert result.exit_code == 0, result.output
    assert "open loop" in result.output
    assert "0 % of all" in result.output
    line, whole = json.loads(result.stdout.splitlines()[-1]), json.loads(json_file.read_text())
    assert line["measured"] == whole["measured"]
    assert (line["loop"], line["token_counts"], line["errors"]) == ("open", "usage", {})
    assert line["measured"]["requests"] == 40
    assert line["measured"]["output_tokens"] == 160
    assert line["measured"]["prompt_tokens"] == 40 * 25  # 10 words of 2 tokens, and 5
    assert "records" not in line
    assert [record["status"] for record in whole["records"]] == [200] * 40
    assert [record["due"] for record in whole["records"]] == sorted(record["due"] for record in whole["records"])
    assert all(len(record["chunk_times"]) == 4 for record in whole["records"])
    assert len(bodies) == 2 + 4 + 40  # the probe, the warm-up
    assert all(body["top_p"] == 0.5 and body["ignore_eos"] and "messages" in body for body in bodies)
    assert "<svg" in picture.read_text()
    assert "P99" in picture.read_text()


def test_a_second_run_does_not_live_off_the_first_ones_cache():
    """Every run has prompts of its own, the warm-up too; with a prompt seed they are the same again."""
    prompts = []
    with ScriptedServer() as server:
        for seed in ([], [], ["--prompt-seed", "7"], ["--prompt-seed", "7"], ["--prompt-seed", "8"]):
            server.bodies.clear()
            result = bench("--base-url", server.url, "--max-concurrency", "1", "--num-requests", "3", *seed)
            assert result.exit_code == 0, result.output
            prompts.append([body["prompt"] for body in server.bodies[2:]])  # after the probe
    assert prompts[2] == prompts[3]
    different = [text for run in (0, 1, 2, 4) for text in prompts[run]]
    assert len(set(different)) == len(different) == 4 * (3 + 3)


def test_a_traces_own_texts_are_what_is_sent(tmp_path):
    """And nothing else of them before, or the run would find its beginnings in the server's cache."""
    trace = tmp_path / "talk.json"
    texts = [f"What, if you please, is the meaning of number {i}?" for i in range(5)]
    trace.write_text(json.dumps([{"conversations": [{"value": t}, {"value": "None at all."}]} for t in texts]))
    with ScriptedServer() as server:
        result = bench("--base-url", server.url, "--trace", str(trace), "--max-concurrency", "1")
        prompts = [body["prompt"] for body in server.bodies]
    assert result.exit_code == 0, result.output
    assert "the trace's own texts" in result.output
    assert prompts[-5:] == texts
    assert not set(prompts[:-5]) & set(texts)


def test_a_tokenizer_sends_a_traces_own_token_ids():
    requests = (TraceRequest(3, 1, prompt_token_ids=[5, 6, 7], prompt_text="abc"), TraceRequest(2, 1))
    maker = PromptMaker(Workload("", "", requests), object(), 5000, as_ids=True, own_variant=4)
    assert maker.prompt(0, 4) == [5, 6, 7]
    assert maker.prompt(0, 5) != [5, 6, 7]
    assert len(maker.prompt(1, 4)) == 2


def test_a_warm_up_that_fails_says_so():
    def script(exchange):
        if 2 <= exchange.number < 6:
            exchange.refuse(429, "full")
        else:
            exchange.answer()

    with ScriptedServer(script) as server:
        result = bench("--base-url", server.url, "--max-concurrency", "1", "--num-requests", "4")
    assert "4 of 4 warm-up requests were not served: HTTP 429" in result.output
    assert json.loads(result.stdout.splitlines()[-1])["errors"] == {}


def test_chunks_count_where_the_server_does_not():
    with ScriptedServer(lambda exchange: exchange.answer(usage=False)) as server:
        result = bench("--base-url", server.url, "--max-concurrency", "2", "--num-requests", "5", "--warmup", "0")
    assert result.exit_code == 0, result.output
    assert "by chunks (the server sends no usage)" in result.output
    assert "closed loop" in result.output
    assert json.loads(result.stdout.splitlines()[-1])["token_counts"] == "chunks"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--slo", "ttft"], "no list of objectives"),
        (["--slo", "ttft=1,ttft=2"], "no list of objectives"),
        (["--plot", "x.png"], "must end in"),
        (["--records"], "--json"),
        (["--extra-body", "[1]"], "JSON object"),
        (["--base-url", "localhost:8000"], "--base-url"),
        (["--ramp-to", "3", "--max-concurrency", "2"], "closed loop"),
        (["--json", "/no/such/folder/run.json"], "cannot be written"),
        (["--plot", "/no/such/folder/run.svg"], "cannot be written"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_sent(args, why):
    result = bench(*args)
    assert result.exit_code == 1
    assert why in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_objectives_have_units():
    assert Objectives.parse("ttft=500ms, tpot=50,e2e=1.5s") == Objectives(0.5, 0.05, 1.5)
