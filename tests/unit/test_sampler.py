"""Sampling against independent oracles: transformers' logits processors, formulas, and exact frequencies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.core.messages import Added
from foretell.core.params import SamplingParams
from foretell.worker.sampler import Sampler, apply_penalties, draw, token_logprobs, truncate, uniform
from foretell.worker.state import RequestState

VOCAB = 700


def state(request_id: int = 0, prompt: list[int] | None = None, outputs: list[int] | None = None, **params: Any):  # type: ignore[no-untyped-def]
    params.setdefault("seed", request_id)
    return RequestState(Added(request_id, SamplingParams(**params), prompt or [1, 2], outputs or []), 1)


def random_logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 800),
    st.floats(0.01, 1.0),
    st.sampled_from([0.0, 0.0, 0.05, 0.3]),
    st.sampled_from([0.3, 1.0, 2.5]),
)
def test_truncation_keeps_the_tokens_that_transformers_keeps(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(3, seed) / temperature
    ours = truncate(logits, [state(i, top_k=top_k, top_p=top_p, min_p=min_p) for i in range(3)])
    ids = torch.zeros(3, 1, dtype=torch.long)
    expected = logits
    if min_p:
        expected = MinPLogitsWarper(min_p)(ids, expected)
    if 0 < top_k < VOCAB:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    kept = torch.softmax(expected, -1)
    # float32 cumulative sums may disagree about a token at the very edge of the nucleus
    disagree = (ours > 0) != (kept > 0)
    assert disagree.sum() <= 1
    assert torch.allclose((ours / ours.sum(-1, keepdim=True))[~disagree], kept[~disagree], atol=5e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0, 1, 257, 2000, 2999]), st.floats(0.001, 0.9999), st.integers(1, 3000)
)
def test_a_flat_nucleus_is_the_smallest_set_with_enough_mass(
    seed: int, top_k: int, top_p: float, levels: int
) -> None:
    """Beyond the first candidates, with ties (few levels of logits), against a plain sort."""
    logits = torch.randint(levels, (2, 3000), generator=torch.Generator().manual_seed(seed)) / 2000
    probs = torch.softmax(logits, -1)
    kept = truncate(logits, [state(i, top_k=top_k, top_p=top_p) for i in range(2)])
    for row, own in zip(probs.double(), kept.double(), strict=True):
        assert bool(((own == 0) | (own == row)).all())
        ordered = row.sort(descending=True).values[: top_k or None]
        count = int((own > 0).sum())
        assert torch.equal(own[own > 0].sort(descending=True).values, ordered[:count])
        goal = top_p * ordered.sum()
        assert ordered[: count - 1].sum() < goal + 1e-9
        assert ordered[:count].sum() > goal - 1e-9


def test_min_p_goes_first_and_top_p_is_of_what_it_leaves() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04]]).log()
    kept = truncate(logits, [state(min_p=0.2, top_p=0.8)])  # 0.5, 0.25, 0.15 are left: 0.75 of 0.9 is enough
    assert (kept > 0).tolist() == [[True, True, False, False, False]]
    assert (truncate(logits, [state(top_p=0.8)]) > 0).sum() == 3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.2, 3))
def test_penalties_follow_their_formulas(seed: int, presence: float, frequency: float, repetition: float) -> None:
    rng = np.random.default_rng(seed)
    prompt, outputs = rng.integers(0, VOCAB, 30).tolist(), rng.integers(0, 40, 25).tolist()
    one = state(
        0, prompt, outputs[:20], presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    logits = random_logits(1, seed)
    apply_penalties(logits.clone(), [one])  # counts are made here, and kept up to date by append
    for token in outputs[20:]:
        one.append(token)
    penalised = logits.clone()
    apply_penalties(penalised, [one])
    ours = penalised[0].tolist()
    for token in range(VOCAB):
        expected = float(logits[0, token])
        if token in prompt or token in outputs:
            expected = expected / repetition if expected > 0 else expected * repetition
        count = outputs.count(token)
        expected -= frequency * count + presence * (count > 0)
        assert ours[token] == pytest.approx(expected, abs=1e-4)


def test_same_seed_same_token_whatever_else_is_in_the_batch() -> None:
    logits = random_logits(40, 5)
    states = [state(i, temperature=0.9, top_p=0.95 if i % 2 else 1.0, top_k=i % 3 * 20) for i in range(40)]
    together = [r.token_id for r in Sampler(VOCAB)(logits, states)]
    alone = [Sampler(VOCAB)(logits[i : i + 1], [s])[0].token_id for i, s in enumerate(states)]
    order = list(reversed(range(40)))
    shuffled = [r.token_id for r in Sampler(VOCAB)(logits[order], [states[i] for i in order])]
    assert together == alone == list(reversed(shuffled))


def test_draws_have_the_asked_frequencies() -> None:
    probs = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    n = 20_000
    states = [state(i, temperature=1.0, seed=i * 7919) for i in range(n)]
    counts = torch.bincount(draw(probs.expand(n, -1), states), minlength=6)
    assert counts[1] == 0
    assert counts[5] == 0
    for count, p in zip(counts.tolist(), probs.tolist(), strict=True):
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9


def test_uniform_is_uniform_and_depends_on_seed_and_index() -> None:
    values = np.array([uniform(seed, index) for seed in range(60) for index in range(200)])
    assert values.min() > 0
    assert values.max() < 1
    assert len(np.unique(values)) > 11_990
    histogram = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((histogram - 600) ** 2 / 600).sum() < 45  # chi², 19 degrees of freedom, p ≈ 0.0007


def test_logprobs_ranks_and_top() -> None:
    logits = random_logits(2, 9)
    tokens = torch.tensor([3, int(logits[1].argmax())])
    first, second = token_logprobs(logits, tokens, [5, 0])
    reference = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    assert first.logprob == pytest.approx(float(reference[0, 3]), abs=1e-5)
    assert first.rank == 1 + int((reference[0] > reference[0, 3]).sum())
    assert [t for t, _ in first.top] == reference[0].topk(5).indices.tolist()
    assert second.rank == 1
    assert second.top == ()


def test_bans_biases_and_minimum_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 4] = 5.0

    def pick(**params: Any) -> int | None:
        extra = {"prompt": params.pop("prompt", None), "outputs": params.pop("outputs", None)}
        return Sampler(10)(logits, [state(0, **extra, temperature=0.0, **params)])[0].token_id

    assert pick() == 4
    assert pick(logit_bias={4: -100.0, 7: 1.0}) == 7
    assert pick(allowed_token_ids=[2, 8], logit_bias={8: 0.5}) == 8
    assert pick(bad_token_ids=[[4]], logit_bias={1: 1.0}) == 1
    assert pick(bad_token_ids=[[9, 4]], outputs=[9], logit_bias={1: 1.0}) == 1
    assert pick(bad_token_ids=[[9, 4]], outputs=[8]) == 4
    assert pick(eos_token_ids=(4,), min_tokens=2, outputs=[1], logit_bias={6: 1.0}) == 6
    assert pick(eos_token_ids=(4,), min_tokens=1, outputs=[1]) == 4


def test_a_bad_word_outside_the_model_s_vocabulary_bans_nothing_and_fails_nobody() -> None:
    """Tokenizers may know ids that the model has no row for (Gemma 3: 262144 of 262144)."""
    states = [state(0, temperature=0.0), state(1, temperature=0.0, bad_token_ids=[[6], [3, 9]], outputs=[3])]
    assert [r.token_id for r in Sampler(6)(random_logits(1, 2, 6).expand(2, -1), states)] == [
        int(random_logits(1, 2, 6).argmax())
    ] * 2


@pytest.mark.parametrize("vocab", [5, 511, 512, 513, 3000])
def test_a_draw_is_where_the_cumulative_distribution_passes_its_number(vocab: int) -> None:
    probs = torch.softmax(random_logits(200, vocab, vocab), -1)
    probs[:, ::3] = 0
    states = [state(i, temperature=1.0, seed=i) for i in range(200)]
    ours = draw(probs, states).tolist()
    cumulative = probs.double().cumsum(-1)
    for row, token in enumerate(ours):
        assert probs[row, token] > 0
        u = uniform(row, 0) * cumulative[row, -1]
        low = float(cumulative[row, token] - probs[row, token])
        assert low - 1e-6 <= u <= float(cumulative[row, token]) + 1e-6


def test_rows_that_cannot_be_sampled_fail_alone() -> None:
    logits = torch.zeros(4, 6)
    logits[0, 2] = 1.0
    logits[1, 3] = float("nan")
    states = [
        state(0, temperature=0.0),
        state(1, temperature=1.0),
        state(2, temperature=0.0, allowed_token_ids=[5], bad_token_ids=[[5]]),
        state(3, temperature=0.0, logit_bias={1: 2.0}),
    ]
    results = Sampler(6)(logits, states)
    assert [r.token_id for r in results] == [2, None, None, 1]
    assert "not finite" in (results[1].error or "")
    assert "no token may be sampled" in (results[2].error or "")


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": "hot"},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"top_k": -2}, {"top_k": 1.5}, {"min_p": -1.0},
        {"n": 0}, {"n": 10**9}, {"n": True}, {"max_tokens": 0}, {"max_tokens": -5}, {"min_tokens": -1},
        {"min_tokens": 9, "max_tokens": 3}, {"presence_penalty": 3.0}, {"frequency_penalty": -2.5},
        {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-300}, {"repetition_penalty": math.nan},
        {"logprobs": -1}, {"logprobs": 10**6},
        {"prompt_logprobs": -3}, {"logit_bias": {3: math.nan}}, {"logit_bias": {-1: 1.0}}, {"stop": [""]},
        {"stop": [3]}, {"stop": ["a"] * 1000}, {"allowed_token_ids": []}, {"allowed_token_ids": [-4]},
        {"stop_token_ids": [1.5]}, {"seed": 1.5}, {"bad_words": [""]},
        {"stop": 5}, {"stop": {"a": 1}}, {"stop": b"a"}, {"bad_words": 1.0}, {"stop_token_ids": 2},
        {"allowed_token_ids": 7}, {"logit_bias": [1]}, {"bad_token_ids": [5]}, {"bad_token_ids": [[]]},
        {"ignore_eos": "no"}, {"detokenize": None}, {"stop": ["a"], "detokenize": False},
    ],
    ids=str,
)  # fmt: skip
def test_bad_parameters_are_refused_by_name(bad: dict[str, Any]) -> None:
    from foretell.errors import InvalidRequestError

    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**bad)
    message = str(caught.value)
    assert "\n" not in message
    assert any(name.rstrip("s") in message for name in bad) or "token ids" in message or "stop" in message
