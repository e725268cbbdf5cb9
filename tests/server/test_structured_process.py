"""Structured output and embeddings through the engine's own process: plain data over the wire, compiled there."""

from __future__ import annotations

import asyncio
import re

import pytest

from foretell.assembly import EngineOptions
from foretell.core.params import SamplingParams
from foretell.core.structured import StructuredOutput
from foretell.errors import InvalidRequestError
from foretell.server.engine_client import EngineClient
from tests.server.instant import QUICK, collect, instant_engine, run, text_of, until_idle
from tests.server.tiny import tiny_folder

CODE = StructuredOutput.regex("[ab]{3,6}c")
SLOW = StructuredOutput.json_schema({"type": "integer", "multipleOf": 99_999_989})  # ended by its limit on CPU time


def test_forms_errors_embeddings_and_callers_who_leave_while_theirs_is_compiled() -> None:
    async def scenario() -> None:
        options = EngineOptions(str(tiny_folder()), load_format="dummy", dtype="float32", kv_cache_bytes=4 << 20)
        client = EngineClient(options, watch=QUICK)
        await client.start()
        try:
            texts = await asyncio.gather(*(text_of(client, "x", 100, structured=CODE, seed=i) for i in range(4)))
            assert all(re.fullmatch("[ab]{3,6}c", text) for text in texts)
            with pytest.raises(InvalidRequestError, match="regex"):
                await text_of(client, "x", structured=StructuredOutput.regex("(a"))
            embedding = (await collect(client, "hello", pooling="mean"))[-1].output.outputs[0].embedding
            assert embedding is not None
            assert abs(sum(x * x for x in embedding) - 1) < 1e-5

            leaving = asyncio.create_task(text_of(client, "x", structured=SLOW))
            staying = asyncio.create_task(text_of(client, "x", structured=SLOW))
            free = await text_of(client, "x", 5)  # is not held up
            assert len(free) >= 1
            leaving.cancel()
            with pytest.raises(InvalidRequestError, match="too much time"):
                await staying
            after = await text_of(client, "x", 100, structured=CODE, seed=9)
            assert re.fullmatch("[ab]{3,6}c", after)
            await until_idle(client)
            assert client.stats()["unfinished"] == 0
        finally:
            await client.close()

    run(scenario)


def test_an_engine_without_grammars_refuses_forms_and_goes_on() -> None:
    async def scenario() -> None:
        async with instant_engine() as client:
            with pytest.raises(InvalidRequestError, match="not available"):
                await collect(client, "ab", structured=CODE)
            assert await text_of(client, "ab") != ""

    run(scenario)


def test_parameters_travel_as_plain_data() -> None:
    import msgspec

    params = SamplingParams(structured=CODE, pooling=None)
    sent = msgspec.msgpack.Decoder(SamplingParams).decode(msgspec.msgpack.encode(params))
    assert sent.structured == CODE
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.Decoder(SamplingParams).decode(
            msgspec.msgpack.encode({"structured": {"kind": "pickle", "value": "x"}})
        )
