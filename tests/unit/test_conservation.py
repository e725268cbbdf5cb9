"""Conservation: ten thousand requests through tiny caches on the virtual executor, and nothing is lost."""

from __future__ import annotations

import random

import pytest

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.virtual import VIRTUAL_EOS, LinearCost, VirtualExecutor

NUM_REQUESTS = 10_000
STARVATION_TURNS = 50
LONGEST_OUTPUT = 60
MOST_WAITING = 44


@pytest.mark.parametrize(
    ("policy", "windows", "num_blocks", "depth", "chain"),
    [
        ("mixed", (None,), (90,), 1, 0),
        ("prefill-first", (None, 40), (90, 60), 2, 1),
        ("decode-first", (None,), (90,), 3, 0),
    ],
)
def test_conservation_over_ten_thousand_requests(
    policy: str, windows: tuple[int | None, ...], num_blocks: tuple[int, ...], depth: int, chain: int
) -> None:
    rng = random.Random(11)
    lengths = {i: rng.randint(1, LONGEST_OUTPUT) for i in range(NUM_REQUESTS)}
    executor = VirtualExecutor(LinearCost(), num_blocks, depth=depth, chain=chain, output_lengths=lengths)
    config = SchedulerConfig(
        max_num_seqs=16,
        max_num_batched_tokens=256,
        max_model_len=400,
        policy=policy,  # type: ignore[arg-type]
        starvation_turns=STARVATION_TURNS,
    )
    engine = Engine(config, executor, windows)
    params = SamplingParams(eos_token_ids=(VIRTUAL_EOS,))
    received = dict.fromkeys(range(NUM_REQUESTS), 0)
    ended: dict[int, str] = {}
    last_news: dict[int, int] = {}  # by request: the turn it came, or had its last token
    longest = 0  # turns without news
    arrived = 0
    while arrived < NUM_REQUESTS or engine.has_work:
        burst = rng.choice((0, 1, 1, 2, 5)) if engine.scheduler.num_waiting <= MOST_WAITING - 5 else 0
        for _ in range(min(burst, NUM_REQUESTS - arrived)):
            prompt = [(arrived % 7) * 1000 + i for i in range(32)] + [rng.randrange(999)] * rng.randint(1, 150)
            engine.add(arrived, prompt, params, priority=rng.choice((0, 0, 0, 5)))
            last_news[arrived] = engine.scheduler.turn
            arrived += 1
        for output in engine.step():
            assert output.request_id not in ended
            received[output.request_id] += output.token_id is not None
            longest = max(longest, engine.scheduler.turn - last_news[output.request_id])
            last_news[output.request_id] = engine.scheduler.turn
            if output.finish_reason:
                ended[output.request_id] = output.finish_reason
        running = engine.scheduler.running
        if rng.random() < 0.02 and running:
            victim = rng.choice(running).id
            engine.finish(victim)
            ended[victim] = "abort"
        if rng.random() < 0.05 and running:
            engine.preempt(rng.choice(running).id)
    # once aged it waits for those before it alone, who leave in waves of ``max_num_seqs``; a token takes depth turns
    waves = -(-MOST_WAITING // config.max_num_seqs)
    assert longest <= depth * (STARVATION_TURNS + waves * LONGEST_OUTPUT), "a request was starved"
    assert len(ended) == NUM_REQUESTS
    for request_id, reason in ended.items():
        assert reason in ("stop", "abort")
        if reason == "stop":
            assert received[request_id] == lengths[request_id], "a token was lost or doubled"
    for pool in engine.scheduler.blocks.pools:
        assert pool.num_free == pool.num_blocks
    assert engine.scheduler.preemptions_by_reason.get("kv_blocks_exhausted", 0) > 0, "the cache was not tight"
