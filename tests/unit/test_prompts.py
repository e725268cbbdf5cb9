"""Prompts in every form that callers give them, and those that are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foretell.core.params import SamplingParams
from foretell.errors import InvalidRequestError
from foretell.prompts import PromptPreparer, as_prompt_list, with_plain_content


def prepared(prompts: Any) -> list[list[int]]:
    preparer = PromptPreparer(None, 100, [2], 0)
    return [preparer.token_ids(prompt) for prompt in as_prompt_list(prompts)]


@pytest.mark.parametrize(
    ("prompts", "ids"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        ((1, 2), [[1, 2]]),
        ([[1, 2], (3,)], [[1, 2], [3]]),
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([4, 5]), [[4, 5]]),
        (torch.tensor([[4], [5]]), [[4], [5]]),
        ((prompt for prompt in ([1], [2, 3])), [[1], [2, 3]]),
        ([], []),
    ],
)
def test_lists_arrays_tensors_and_generators(prompts: Any, ids: list[list[int]]) -> None:
    found = prepared(prompts)
    assert found == ids
    assert all(type(token_id) is int for prompt in found for token_id in prompt)


@pytest.mark.parametrize(
    "prompts",
    [
        None, 5, b"bytes", bytearray(b"x"), {"prompt": "a mapping"}, {1, 2}, [b"bytes"], [{"prompt_token_ids": [1]}],
        [None], [1, "a"], [[1.5]], [[None]], [[[1]]], [[True]], np.array([[0.5, 1.0]]), torch.tensor([[[1]]]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_neither_text_nor_ids_is_refused_not_read_as_something_else(prompts: Any) -> None:
    with pytest.raises(InvalidRequestError, match="text or a list of token ids") as caught:
        prepared(prompts)
    assert "\n" not in str(caught.value)


def test_parameters_that_are_none_are_refused() -> None:
    preparer: Any = PromptPreparer(None, 100, [2], 0)
    with pytest.raises(InvalidRequestError, match="SamplingParams, got dict"):
        preparer.params({"temperature": 0})
    assert preparer.params(SamplingParams(seed=1)).eos_token_ids == (2,)


def test_content_in_parts_is_text_or_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert with_plain_content({"role": "user", "content": parts}) == {"role": "user", "content": "a\nb"}
    for plain in ({"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": []}):
        assert with_plain_content(plain) is plain
    for part in ({"type": "image_url", "image_url": {"url": "http://x"}}, "a", {"type": "text"}):
        with pytest.raises(InvalidRequestError, match="reads text only"):
            with_plain_content({"role": "user", "content": [part]})
