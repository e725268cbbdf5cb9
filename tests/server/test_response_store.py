"""Kept answers: bounded, the longest unasked go first, each its owner's alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from foretell.server.response_store import ResponseStore, owner_of

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "get", "delete"]), st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 90)
    ),
    max_size=60,
)


def response(number: int, size: int) -> dict[str, Any]:
    return {"id": f"resp_{number}", "text": "x" * size}


@given(STEPS, st.integers(1, 5), st.integers(60, 400))
def test_a_store_is_what_its_history_says(steps: Any, max_responses: int, max_bytes: int) -> None:
    store, model = ResponseStore(max_responses, max_bytes), {}  # the model: a dict in order of last use
    for verb, owner, number, size in steps:
        key = (owner, f"resp_{number}")
        if verb == "put" and key not in model:  # ids are random, so none comes twice
            talk = [{"role": "user", "content": "y" * size}]
            store.put(owner, response(number, size), talk)
            num_bytes = len('{"id":"resp_0","text":""}') + len('[{"role":"user","content":""}]') + 2 * size
            if num_bytes <= max_bytes:
                model[key] = num_bytes
            while len(model) > max_responses or sum(model.values()) > max_bytes:
                del model[next(iter(model))]
        elif verb == "get":
            found = store.get(*key)
            assert (found is not None) == (key in model)
            if found is not None:
                model[key] = model.pop(key)
        elif verb == "delete":
            assert store.delete(*key) == (model.pop(key, None) is not None)
        assert (len(store), store.num_bytes) == (len(model), sum(model.values()))


def test_owners_are_told_apart_and_no_key_can_be_read() -> None:
    assert owner_of(["sk-one"]) != owner_of(["sk-two"]) != owner_of([])
    assert owner_of(["sk-one", "sk-two"]) == owner_of(["sk-two", "sk-one", "sk-one"])
    assert "sk-one" not in owner_of(["sk-one"])
