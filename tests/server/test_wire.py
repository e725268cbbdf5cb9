"""Frames between the processes: what goes in comes out, and nothing that comes in can do harm."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.assembly import EngineOptions
from foretell.children import PARENT_VARIABLE
from foretell.core.counters import Progress
from foretell.core.messages import Output, TokenLogprobs
from foretell.core.params import SamplingParams
from foretell.server import wire
from foretell.server.engine_port import wire_options
from tests.server.instant import SCRIPT, collect, expected_text, instant_engine, run, text_of, until

LOGPROBS = TokenLogprobs(5, -0.25, 1, ((5, -0.25), (7, -math.inf)))
TO_ENGINE = [
    wire.Start({"model": "m", "kv_cache_bytes": None}),
    wire.Add(3, [1, 2, 3], SamplingParams(n=2, logit_bias={4: -1.5}, stop=["a"], seed=2**63, logprobs=3), -1, 2.5),
    wire.Finish([1, 2], "stop"),
    wire.Control(1, "set_policy", {"name": "mixed"}),
    wire.Ping(),
    wire.Shutdown(),
]
FROM_ENGINE = [
    wire.Phase("weights", 1.5),
    wire.Failed("no", True),
    wire.Step(
        1.5, [1, 2], [30, 40], [Output(3, 4, LOGPROBS, [LOGPROBS], "stop", 4, "no", [0.5], Progress(1.0, 16, 2))]
    ),
    wire.Refused(3, "too long"),
    wire.Answer(1, {"a": [1, None]}, None),
    wire.Stats({"running": 1, "kv_usage": 0.5}),
]
STREAMS = [(TO_ENGINE, wire.to_engine), (FROM_ENGINE, wire.from_engine)]


@pytest.mark.parametrize(("messages", "decoder"), STREAMS)
@given(cuts=st.lists(st.integers(1, 40), max_size=30))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(messages: Any, decoder: Any, cuts: Any) -> None:
    data = b"".join(wire.encode(m) for m in messages)
    reader, got = wire.FrameReader(decoder), []
    for size in [*cuts, len(data)]:
        got += reader.feed(data[:size])
        data = data[size:]
    assert [repr_of(m) for m in got] == [repr_of(m) for m in messages]


def repr_of(message: Any) -> Any:
    """Tuples and lists are one thing on the wire."""
    return msgspec.msgpack.encode(message)


def test_every_sampling_parameter_crosses() -> None:
    """A parameter that the wire cannot say would be lost, or end the engine, only when somebody uses it."""
    params = SamplingParams(
        n=2, temperature=0.5, top_k=5, top_p=0.5, min_p=0.1, presence_penalty=1.0, frequency_penalty=-1.0,
        repetition_penalty=1.5, logit_bias={1: 2.0}, allowed_token_ids=[1], bad_words=["x"], bad_token_ids=[[1]],
        seed=-(2**63), stop=["s"], stop_token_ids=[2], include_stop_str_in_output=True, ignore_eos=True, min_tokens=1,
        max_tokens=3, logprobs=1, prompt_logprobs=0, skip_special_tokens=False, eos_token_ids=[9],
    )  # fmt: skip
    for sent in (params, replace(params, stop=[], detokenize=False)):  # stops are found in text
        (came,) = wire.FrameReader(wire.to_engine).feed(wire.encode(wire.Add(0, [1], sent, 0, 0.0)))
        for field in fields(SamplingParams):
            assert repr_of(getattr(came.params, field.name)) == repr_of(getattr(sent, field.name)), field.name


def test_a_frame_that_is_too_long_is_refused_on_both_sides() -> None:
    with pytest.raises(wire.WireError, match="longer than"):
        wire.encode(wire.Answer(1, b"x" * (wire.MAX_FRAME_BYTES + 1)))
    with pytest.raises(wire.WireError, match="announced"):
        list(wire.FrameReader(wire.to_engine).feed((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "big")))


@settings(max_examples=400)
@given(data=st.binary(max_size=200), framed=st.booleans())
def test_garbage_is_an_error_of_ours_and_nothing_else(data: bytes, framed: bool) -> None:
    for decoder in (wire.to_engine, wire.from_engine):
        reader = wire.FrameReader(decoder)
        try:
            for message in reader.feed(len(data).to_bytes(4, "big") + data if framed else data):
                assert isinstance(message, wire.Message)
        except wire.WireError:
            pass


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_message_is_an_error_of_ours_or_another_message(data: Any) -> None:
    messages, decoder = data.draw(st.sampled_from(STREAMS))
    frame = wire.encode(data.draw(st.sampled_from(messages)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        for message in wire.FrameReader(decoder).feed(bytes(frame)):
            assert isinstance(message, wire.Message)
    except wire.WireError:
        pass


def nested(depth: int) -> bytes:
    return bytes([0x91]) * depth + b"\xc0"


@pytest.mark.parametrize("body", [nested(100_000), b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xa3Add", b""])
def test_bombs(body: bytes) -> None:
    for decoder in (wire.to_engine, wire.from_engine):
        with pytest.raises(wire.WireError):
            list(wire.FrameReader(decoder).feed(len(body).to_bytes(4, "big") + body))


# -- whole processes --------------------------------------------------------------------------------

START = bytes(wire.encode(wire.Start(wire_options(EngineOptions("m")))))
ADD = bytes(wire.encode(wire.Add(0, [1, 2], SamplingParams(max_tokens=100_000), 0, 0.0)))
BAD_PARAMS = bytes(wire.encode(wire.Answer(1, None)))  # a message, but not one for this side


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        ADD,
        START,
        START + START,
        START + ADD + b"\x00\x00\x00\x02\xc1\xc1",
        START + ADD + BAD_PARAMS,
        START + ADD[:20],
        bytes(wire.encode(wire.Start({"model": "m", "nonsense": 1}))),
    ],
    ids=range(10),
)
def test_an_engine_process_ends_by_itself_whatever_it_is_sent(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
    command = [sys.executable, str(SCRIPT), str(theirs.fileno())]
    with (
        ours,
        subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        theirs.close()
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        while ours.recv(1 << 16):
            pass
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "Traceback" not in stderr


BABBLER = """
import socket, sys, time
from foretell.server import wire
sys.argv[1:-1] or sys.exit("what to say?")
connection = socket.socket(fileno=int(sys.argv[-1]))
reader = wire.FrameReader(wire.to_engine)
ready = wire.Ready("m", None, 100, [99], 1000, 1000, 4, "none", "none", "none", 0, 0, 0, 1000, {})
while data := connection.recv(65536):
    for message in reader.feed(data):
        if isinstance(message, wire.Start):
            connection.sendall(wire.encode(ready))
        if isinstance(message, wire.Add):
            connection.sendall(bytes.fromhex(sys.argv[1]))
        if isinstance(message, wire.Shutdown):
            sys.exit()
"""


@pytest.mark.parametrize("said", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x03\x91\xa1x", ADD, b"\x00\x00\x00\x01\xc1"])
def test_the_server_survives_an_engine_that_babbles(said: bytes) -> None:
    async def scenario() -> None:
        command = [sys.executable, "-c", BABBLER, said.hex()]
        async with instant_engine(command=command) as client:
            first = client.supervisor.pid
            with pytest.raises(Exception, match="connection is broken"):
                await collect(client, "ab")
            await until(lambda: client.is_ready)
            assert client.supervisor.pid != first

    run(scenario)


def test_news_that_fit_no_frame_end_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt log-probabilities of a long prompt, say."""

    async def scenario() -> None:
        async with instant_engine(command=[sys.executable, "-c", SMALL_FRAMES, str(SCRIPT)]) as client:
            updates = await collect(client, "long", 8, logprobs=5)
            assert updates[-1].finish_reason == "error"
            assert "longer than" in str(updates[-1].output.outputs[0].error)
            assert await text_of(client, "ab") == expected_text("ab", 8)

    run(scenario)


SMALL_FRAMES = """
import runpy, sys
from foretell.core.messages import ChunkResult, TokenLogprobs
from foretell.executor import instant
from foretell.server import wire
wire.MAX_FRAME_BYTES = 1000
run = instant.InstantRunner.execute
asked = set()
def execute(self, batch):
    asked.update(a.request_id for a in batch.added if a.params.logprobs)
    results = run(self, batch)
    for result in results:
        if result.request_id in asked:
            result.logprobs = TokenLogprobs(1, -1.0, 1, tuple((i, -1.0) for i in range(500)))
    return results
instant.InstantRunner.execute = execute
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
