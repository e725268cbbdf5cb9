"""Dummy weights on a GPU are weights like others: a plain forward of transformers with them gives the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.model.device_weights import DeviceDummyWeights
from foretell.model.families import tensor_naming
from foretell.model.load import spec_for
from foretell.store import resolve
from tests.gpu.test_engine_gpu import options, oracle_gaps, prompts, write_random_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ["llama-gqa-64", "llama-mqa-128", "qwen3"])
def test_dummy_weights_give_the_tokens_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    oracle = write_random_model(name, tmp_path)
    spec = spec_for(resolve(str(tmp_path)))
    weights, parameters = DeviceDummyWeights(spec, 0, torch.device("cuda")), dict(oracle.named_parameters())
    for own, place in tensor_naming(spec).sources(spec, set(parameters)).items():
        assert place.transform is None
        parameters[place.name].data.copy_(weights.read(own, torch.float32))
    wanted = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(tmp_path), load_format="dummy", **options()) as llm:
        outputs = llm.generate(prompts(24), wanted, progress=False)
    for prompt, output in zip(prompts(24), outputs, strict=True):
        assert max(oracle_gaps(oracle, prompt, list(output.outputs[0].token_ids))) < 1e-5
