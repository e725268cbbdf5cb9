"""The engine in its own process: text comes out right, callers may leave, queue and deadlines hold."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import Any

import pytest

from foretell.core.params import SamplingParams
from foretell.errors import DeadlineError, ForetellError, InvalidRequestError, OverloadedError, UnavailableError
from foretell.server.engine_client import EngineClient
from tests.server.instant import collect, expected_text, instant_engine, run, text_of, until, until_idle

FOR_EVER = 200_000


def test_many_at_once_each_get_their_own_text() -> None:
    async def scenario() -> None:
        async with instant_engine(max_num_seqs=16) as client:
            prompts = [f"prompt number {i}" for i in range(64)]
            texts = await asyncio.gather(*(text_of(client, p, 20 + i % 7) for i, p in enumerate(prompts)))
            assert texts == [expected_text(p, 20 + i % 7) for i, p in enumerate(prompts)]
            figures = await until_idle(client)
            assert figures["generation_tokens"] == sum(map(len, texts))
            assert figures["prompt_tokens"] == sum(map(len, prompts))

    run(scenario)


def test_n_outputs_stop_strings_and_figures() -> None:
    async def scenario() -> None:
        async with instant_engine() as client:
            whole = expected_text("ab", 30)
            updates = await collect(client, "ab", 30, n=3, stop=[whole[10:12]])
            output = updates[-1].output
            assert output.finished
            for completion in output.outputs:
                assert (completion.text, completion.finish_reason) == (whole[:10], "stop")
                assert completion.stop_reason == whole[10:12]
            for index in range(3):
                assert "".join(u.delta_text for u in updates if u.index == index) == whole[:10]
            metrics = output.metrics
            assert metrics.first_scheduled is not None
            assert metrics.first_token is not None
            assert metrics.last_token is not None
            assert metrics.arrival <= metrics.first_scheduled <= metrics.first_token <= metrics.last_token
            await until_idle(client)

    run(scenario)


def test_whoever_leaves_is_forgotten_within_one_step() -> None:
    """Generation does not go on after the client left (llama.cpp#24496)."""

    async def scenario() -> None:
        async with instant_engine(step_seconds=0.02) as client:
            stream = client.stream("ab", SamplingParams(max_tokens=FOR_EVER))
            await anext(stream)
            before = (await client.control("stats"))["steps"]
            await stream.aclose()  # type: ignore[attr-defined]
            figures = await client.control("stats")
            assert figures["requests"] == 0
            assert figures["steps"] - before <= 2  # the one in progress, and one that began before the word came
            assert figures["kv_blocks_held"] == 0
            assert client.stats()["unfinished"] == 0

    run(scenario)


def test_a_cancelled_task_leaves_too() -> None:
    async def scenario() -> None:
        async with instant_engine() as client:
            tasks = [asyncio.create_task(collect(client, "ab", FOR_EVER, n=2)) for _ in range(5)]
            await until(lambda: client.stats()["running"] == 10)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until_idle(client)
            assert await text_of(client, "ab") == expected_text("ab", 8)

    run(scenario)


def test_a_full_queue_says_when_to_come_back() -> None:
    """The queue is bounded (vllm#18826)."""

    async def scenario() -> None:
        async with instant_engine(max_queue=4) as client:
            held = [client.stream("ab", SamplingParams(max_tokens=FOR_EVER, n=2)) for _ in range(2)]
            for stream in held:
                await anext(stream)
            assert not client.is_ready
            assert client.is_healthy
            with pytest.raises(OverloadedError, match="4 outputs are unfinished") as refused:
                await text_of(client, "ab")
            assert 1 <= refused.value.retry_after_seconds <= 60
            with pytest.raises(InvalidRequestError, match="n=5"):
                await text_of(client, "ab", n=5)
            await held[0].aclose()  # type: ignore[attr-defined]
            assert await text_of(client, "ab") == expected_text("ab", 8)
            await held[1].aclose()  # type: ignore[attr-defined]
            assert client.is_ready

    run(scenario)


def test_a_deadline_ends_the_request_and_only_that() -> None:
    async def scenario() -> None:
        async with instant_engine(step_seconds=0.01) as client:
            other = asyncio.create_task(text_of(client, "xy", 50))
            with pytest.raises(DeadlineError, match=r"within 0\.2 s"):
                await text_of(client, "ab", FOR_EVER, timeout_seconds=0.2)
            await other
            assert other.result() == expected_text("xy", 50)
            await until_idle(client)

    run(scenario)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("", {}),
        ([2**40], {}),
        ([-1], {}),
        ([1] * 300_000, {}),
        ("ab", {"priority": 2**70}),
        ("ab", {"priority": 0.5}),
        ("ab", {"stop": ["\ud800"]}),
        ("ab", {"ignore_eos": "perhaps"}),
        ("ab", {"skip_special_tokens": None}),
        ("ab", {"bad_token_ids": [["x"]]}),
    ],
)
def test_what_cannot_run_is_refused_and_harms_nobody(
    prompt: Any, options: dict[str, Any], shared: tuple[asyncio.Runner, EngineClient]
) -> None:
    runner, client = shared
    pid = client.supervisor.pid
    with pytest.raises(InvalidRequestError):
        runner.run(collect(client, prompt, **options))
    assert runner.run(text_of(client, "ab")) == expected_text("ab", 8)
    assert client.supervisor.pid == pid, "the engine was restarted"


@pytest.fixture(scope="module")
def shared() -> Any:
    with asyncio.Runner() as runner:
        context = instant_engine()
        client = runner.run(context.__aenter__())
        yield runner, client
        runner.run(context.__aexit__(None, None, None))


def test_long_prompts_are_tokenised_elsewhere(shared: tuple[asyncio.Runner, EngineClient]) -> None:
    runner, client = shared
    prompt = "many words " * 5000
    assert runner.run(text_of(client, prompt, 3)) == expected_text(prompt, 3)


def test_the_policy_can_be_switched_and_steps_recorded(shared: tuple[asyncio.Runner, EngineClient]) -> None:
    runner, client = shared

    async def scenario() -> None:
        assert await client.control("set_policy", name="decode-first") == {"policy": "decode-first"}
        assert client.supervisor.options["policy"] == "decode-first"
        with pytest.raises(InvalidRequestError, match="fastest"):
            await client.control("set_policy", name="fastest")
        with pytest.raises(InvalidRequestError, match="no command 'rm'"):
            await client.control("rm")
        with pytest.raises(InvalidRequestError, match="unexpected keyword"):
            await client.control("stats", all=True)
        assert await client.control("steps", keep=8) == []
        await text_of(client, "ab", 20)
        records = await client.control("steps", keep=0)
        assert len(records) == 8
        assert {record["policy"] for record in records} == {"decode-first"}
        assert await client.control("steps", keep=0) == []

    runner.run(scenario())


def test_a_slow_reader_gets_everything_in_fewer_pieces(shared: tuple[asyncio.Runner, EngineClient]) -> None:
    runner, client = shared

    async def scenario() -> None:
        stream = client.stream("ab", SamplingParams(max_tokens=500))
        updates = [await anext(stream)]
        await until(lambda: updates[0].output.finished)
        updates += [update async for update in stream]
        assert len(updates) <= 3
        assert "".join(u.delta_text for u in updates) == expected_text("ab", 500)
        assert sum(len(u.delta_token_ids) for u in updates) == 500
        assert updates[-1].finish_reason == "length"

    runner.run(scenario())


def test_draining_takes_no_more_and_finishes_what_it_has() -> None:
    async def scenario() -> None:
        async with instant_engine(step_seconds=0.002) as client:
            under_way = asyncio.create_task(text_of(client, "ab", 100))
            await until(lambda: client.stats()["running"] == 1)
            client.drain()
            assert not client.is_ready
            with pytest.raises(UnavailableError, match="shutting down"):
                await text_of(client, "xy")
            assert await under_way == expected_text("ab", 100)

    run(scenario)


def test_closing_tells_those_under_way() -> None:
    async def scenario() -> None:
        async with instant_engine() as client:
            under_way = asyncio.create_task(text_of(client, "ab", FOR_EVER))
            await until(lambda: client.stats()["running"] == 1)
            await client.close()
            with pytest.raises(UnavailableError, match="stopped"):
                await under_way
            with pytest.raises(ForetellError):
                await client.control("stats")

    run(scenario)


def test_the_event_loop_goes_on_while_a_long_prompt_is_tokenised(shared: tuple[asyncio.Runner, EngineClient]) -> None:
    """A long prompt must not spike everyone's latency (vllm#21495): tokenising lets go of the interpreter."""
    runner, client = shared
    assert client.tokenizer is not None
    tokenizer = client.tokenizer
    text = "many words " * 100_000

    def work() -> float:
        started = time.perf_counter()
        assert len(tokenizer.encode(text)) == len(text)
        return time.perf_counter() - started

    async def scenario() -> float:
        """The longest stop of the loop, as a share of the time that tokenising took."""
        task, turns = asyncio.create_task(asyncio.to_thread(work)), []
        while not task.done():
            turns.append(time.perf_counter())
            await asyncio.sleep(0)
        return max(b - a for a, b in pairwise(turns)) / task.result()

    assert runner.run(scenario()) < 0.6  # holding the interpreter: all of it
