"""Several engines as one: where requests go, and that a dead replica costs nobody an answer."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.assembly import EngineOptions
from foretell.core.params import SamplingParams
from foretell.errors import OverloadedError, UnavailableError
from foretell.routing import PIECE_CHARS, PIECE_TOKENS, Beginnings, pieces_of
from foretell.server.engine_client import EngineClient
from foretell.server.replicas import ReplicaSet
from tests.server.instant import QUICK, expected_text, instant_command, run, until
from tests.server.tiny import tiny_folder

FOR_EVER = 200_000


@asynccontextmanager
async def replica_set(count: int, *, step_seconds: float = 0.0, **options: Any) -> AsyncIterator[ReplicaSet]:
    replicas = ReplicaSet(
        [
            EngineClient(
                EngineOptions(str(tiny_folder())), watch=QUICK, command=instant_command(step_seconds), **options
            )
            for _ in range(count)
        ]
    )
    await replicas.start()
    try:
        yield replicas
    finally:
        await replicas.close()


async def text_of(replicas: ReplicaSet, prompt: str, max_tokens: int = 8) -> str:
    params = SamplingParams(max_tokens=max_tokens)
    return "".join([update.delta_text async for update in replicas.stream(prompt, params)])


def prompt_tokens(replicas: ReplicaSet) -> list[int]:
    return [int(stats["prompt_tokens"]) for stats in replicas.stats()["replicas"]]


def test_equal_beginnings_go_together_and_others_are_spread() -> None:
    async def scenario() -> None:
        async with replica_set(2) as replicas:
            stems = [letter * PIECE_CHARS for letter in "ab"]
            for turn in range(6):  # one after the other: nobody is busy
                for stem in stems:
                    prompt = f"{stem}{turn}"
                    assert await text_of(replicas, prompt) == expected_text(prompt, 8)
            chosen = [replicas.best(pieces_of(stem))[0] for stem in stems]
            assert {replicas.members.index(member) for member in chosen} == {0, 1}
            assert [replicas.best(pieces_of(stem))[0] for stem in stems] == chosen

    run(scenario)


def test_a_busy_replica_is_passed_over_for_an_idle_one() -> None:
    async def scenario() -> None:
        async with replica_set(2, step_seconds=0.01) as replicas:
            stem = "s" * PIECE_CHARS
            streams = [replicas.stream(stem, SamplingParams(max_tokens=FOR_EVER)) for _ in range(12)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            assert min(member.unfinished for member in replicas.members) >= 3
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]
            assert [member.unfinished for member in replicas.members] == [0, 0]
            await until(lambda: replicas.stats()["running"] == 0)

    run(scenario)


def test_a_full_queue_is_passed_over_and_all_full_says_so() -> None:
    async def scenario() -> None:
        async with replica_set(2, step_seconds=0.01, max_queue=1) as replicas:
            streams = [replicas.stream("ab", SamplingParams(max_tokens=FOR_EVER)) for _ in range(2)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            with pytest.raises(OverloadedError):
                await text_of(replicas, "ab")
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]

    run(scenario)


def test_the_death_of_a_replica_loses_only_answers_that_had_begun() -> None:
    async def scenario() -> None:
        async with replica_set(2, step_seconds=0.005) as replicas:
            streams = [replicas.stream(f"p{i}", SamplingParams(max_tokens=FOR_EVER)) for i in range(2)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            victim = replicas.replicas[0]
            os.kill(int(victim.stats()["engine_pid"]), signal.SIGKILL)
            ends = await asyncio.gather(*(_rest(stream, 20) for stream in streams), return_exceptions=True)
            assert sum(isinstance(end, UnavailableError) for end in ends) == 1
            # while it is down, and after it is back, everything is answered
            texts = await asyncio.gather(*(text_of(replicas, f"q{i}") for i in range(20)))
            assert texts == [expected_text(f"q{i}", 8) for i in range(20)]
            await until(lambda: victim.is_running)
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]

    run(scenario)


async def _rest(stream: AsyncIterator[Any], count: int) -> None:
    for _ in range(count):
        await anext(stream)


def test_commands_reach_every_replica_and_figures_are_summed() -> None:
    async def scenario() -> None:
        async with replica_set(3) as replicas:
            await replicas.control("set_policy", name="prefill-first")
            policies = [(await replica.control("stats"))["policy"] for replica in replicas.replicas]
            assert policies == ["prefill-first"] * 3
            await replicas.control("steps", keep=100)
            await asyncio.gather(*(text_of(replicas, f"{i}") for i in range(9)))
            await until(lambda: replicas.stats()["generation_tokens"] == 72)
            assert all(n > 0 for n in prompt_tokens(replicas))
            records = await replicas.control("steps", keep=0)
            assert sum(record["tokens"] for record in records) >= 72  # of one replica alone: a third
            assert replicas.is_ready
            assert replicas.is_healthy

    run(scenario)


def test_a_replica_that_is_down_comes_back_with_the_policy_that_was_set_meanwhile() -> None:
    async def scenario() -> None:
        async with replica_set(2) as replicas:
            victim = replicas.replicas[0]
            os.kill(int(victim.stats()["engine_pid"]), signal.SIGKILL)
            await until(lambda: not victim.is_running)
            await replicas.control("set_policy", name="decode-first")
            await until(lambda: victim.is_running)
            assert (await victim.control("stats"))["policy"] == "decode-first"

    run(scenario)


@given(st.lists(st.integers(0, 3), max_size=300), st.integers(0, 300))
def test_pieces_are_equal_exactly_as_far_as_the_prompts_are(ids: list[int], cut: int) -> None:
    other = [*ids[:cut], 9, *ids[cut + 1 :]]
    same = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
    ours, theirs = pieces_of(ids), pieces_of(other)
    equal = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    assert equal == min(same // PIECE_TOKENS, len(ours), len(theirs))


def test_memory_of_beginnings_is_bounded_and_forgets_the_oldest() -> None:
    seen = Beginnings(capacity=4)
    prompts = [[i] * PIECE_TOKENS * 2 for i in range(5)]
    for prompt in prompts:
        seen.note(pieces_of(prompt))
    assert [seen.matching(pieces_of(p)) for p in prompts] == [0, 0, 0, 2, 2]
