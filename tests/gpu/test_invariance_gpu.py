"""The batch-invariant mode: a request's tokens and log-probabilities do not depend on who shares its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foretell import LLM, RequestOutput, SamplingParams
from tests.gpu.test_engine_gpu import options, prompts, write_random_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
WATCHED = (0, 17, 101, 255)
CHUNKINGS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 8192, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 300, "max_chunk_tokens": 37},
    {"max_num_batched_tokens": 1024, "policy": "prefill-first"},
]


def wanted(number: int) -> SamplingParams:
    """Those watched tell their log-probabilities, to the last bit; some draw their tokens."""
    watched = number in WATCHED
    drawn: dict[str, Any] = {"temperature": 0.8, "seed": number} if number % 3 == 1 else {"temperature": 0}
    return SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2 if watched else None, **drawn)


def told(output: RequestOutput) -> Any:
    own = output.outputs[0]
    assert own.error is None
    return list(own.token_ids), [(one.logprob, one.top) for one in own.logprobs or ()]


@pytest.mark.parametrize("name", ["llama-gqa-64", "llama-mha-80", "gemma3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_request_alone_among_255_others_and_in_any_chunks(name: str, dtype: str, tmp_path: Path) -> None:
    write_random_model(name, tmp_path)
    given, found = prompts(256, 500), []
    for chunking in CHUNKINGS:
        mode = options(dtype=dtype, max_num_seqs=256, batch_invariant=True, kv_cache_bytes=1 << 30)
        with LLM(str(tmp_path), **mode | chunking) as llm:
            together = [told(o) for o in llm.generate(given, [wanted(i) for i in range(256)], progress=False)]
            found.append(together)
            for number in WATCHED:
                alone = llm.generate(given[number], wanted(number), progress=False)[0]
                assert told(alone) == together[number], (name, chunking, number)
    assert found[0] == found[1]
    assert found[0] == found[2]
