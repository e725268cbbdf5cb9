"""Forms and embeddings where several processes share the model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from foretell import LLM, SamplingParams, StructuredOutput
from foretell.errors import InvalidRequestError
from tests.server.tiny import tiny_folder

OPTIONS: dict[str, Any] = {"load_format": "dummy", "dtype": "float32", "kv_cache_bytes": 4_000_000, "num_threads": 2}
CODE = SamplingParams(structured=StructuredOutput.regex("[ab]{3,6}c"), temperature=0, max_tokens=20)


def test_outputs_have_the_form_and_embeddings_are_those_of_one_process() -> None:
    with LLM(str(tiny_folder()), **OPTIONS) as llm:
        wanted, vectors = llm.generate(["one", "two"], CODE), llm.embed(["one", "another"])
    with LLM(str(tiny_folder()), tp=2, pp=1, **OPTIONS) as llm:
        found, shared = llm.generate(["one", "two"], CODE), llm.embed(["one", "another"])
        with pytest.raises(InvalidRequestError, match="regex"):
            llm.generate("x", SamplingParams(structured=StructuredOutput.regex("(")))
        left = llm.assembly.engine.executor.prepare(SamplingParams(structured=StructuredOutput.regex("new")))
        assert left is not None
        assert not left.cancel()  # a caller who leaves while its form is compiled does not take the engine along
        left.result(30)
    assert all(re.fullmatch("[ab]{3,6}c", output.outputs[0].text) for output in found)
    assert [o.outputs[0].finish_reason for o in found] == ["stop", "stop"]
    assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in wanted]
    for one, other in zip(vectors, shared, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
