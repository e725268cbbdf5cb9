"""Requests that nobody means well, over a socket: see hostile.py. The long campaign is marked slow."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell.server.config import ServerConfig
from foretell.server.errors import ApiError
from foretell.server.limits import depth, parse_json
from foretell.server.local_engine import LocalTextEngine
from tests.server.campaign import Campaign
from tests.server.client import request, run
from tests.server.live import serving


@pytest.fixture(scope="module")
def port(tiny: LocalTextEngine) -> Iterator[int]:
    with serving(tiny, ServerConfig(served_model_names=("tiny",), body_timeout_seconds=2.0)) as url:
        yield int(url.rpartition(":")[2])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.randoms(use_true_random=False))
def test_no_request_is_answered_by_a_failure_of_ours(port: int, random: Random) -> None:
    campaign = Campaign(port, 0)
    campaign.random = random
    run(campaign.run(1))
    assert not campaign.faults


def test_the_server_answers_as_before_after_hundreds_of_them(port: int, tiny: LocalTextEngine) -> None:
    campaign = Campaign(port, 2025)

    async def go() -> tuple[str, str]:
        before = await campaign.still_answers()
        await campaign.run(600)
        return before, await campaign.still_answers()

    before, after = run(go())
    assert not campaign.faults
    assert before == after
    assert tiny.unfinished == 0
    assert campaign.counts["400"] > 200
    assert campaign.counts["200"] > 20


@pytest.mark.slow
def test_a_hundred_thousand_of_them(port: int, tiny: LocalTextEngine) -> None:
    campaign = Campaign(port, 7)

    async def go() -> tuple[str, str]:
        before = await campaign.still_answers()
        await campaign.run(100_000)
        return before, await campaign.still_answers()

    before, after = run(go())
    print(campaign.counts)
    assert not campaign.faults
    assert before == after
    assert tiny.unfinished == 0


BOMBS = {
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a surrogate pair the wrong way": b'{"prompt": "\\udc00\\ud800"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "a number beyond any": b'{"prompt": "x", "temperature": 1e999}',
    "an integer of a million digits": b'{"prompt": "x", "seed": ' + b"9" * 1_000_000 + b"}",
    "a key twice": b'{"prompt": "x", "prompt": "y"}',
    "a key twice, deep down": b'{"prompt": "x", "response_format": {"type": "text", "type": "json_object"}}',
    "100,000 lists": b"[" * 100_000,
    "100,000 objects": b'{"a":' * 100_000,
    "70 closed lists": b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}",
    "nothing": b"",
    "a string": b'"prompt"',
    "a list": b"[]",
    "null": b"null",
    "two objects": b'{"prompt": "x"}{"prompt": "x"}',
    "a comment": b'{"prompt": "x" /* really */}',
    "half": b'{"prompt": "x',
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_no_clean_json_is_a_400(tiny: LocalTextEngine, path: str, bomb: str) -> None:
    answer = request(tiny, "POST", path, content=BOMBS[bomb], headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(answer.content) < 1000


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=json_values)
def test_all_clean_json_is_read_as_it_is(value: object) -> None:
    """The oracle is the standard library's reader, which takes all that is clean, and more."""
    import json

    assert parse_json(json.dumps(value).encode(), 64) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), 64) is not NotImplemented


@given(levels=st.integers(0, 100), limit=st.integers(1, 64), objects=st.booleans())
def test_depth_is_counted_and_bounded(levels: int, limit: int, objects: bool) -> None:
    text = '{"a":' * levels + "1" + "}" * levels if objects else "[" * levels + "1" + "]" * levels
    if levels <= limit:
        assert depth(parse_json(text.encode(), limit), limit) == levels
    else:
        with pytest.raises(ApiError, match="deeper than"):
            parse_json(text.encode(), limit)
