"""Forms and embeddings with the model on a GPU: the form holds, the embedding is transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from foretell import LLM, SamplingParams, StructuredOutput
from tests.server.tiny import VOCAB, write_model

CODE = StructuredOutput.regex("[ab]{3,6}c")
TEXTS = ["hello there, " * 20, "x", "another text of some length"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore")
def test_forms_hold_and_embeddings_are_those_of_transformers(device: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    write_model(tmp_path)
    torch.manual_seed(5)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=256, intermediate_size=640, eos_token_id=258, **shape)
    oracle = LlamaForCausalLM(config).float().eval()
    oracle.save_pretrained(tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == VOCAB
    options = {"device": device, "dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with LLM(str(tmp_path), kv_cache_bytes=20_000_000, max_model_len=512, **options) as llm:
        each = [SamplingParams(structured=CODE if i % 2 else None, seed=i, max_tokens=12) for i in range(12)]
        outputs = [o.outputs[0] for o in llm.generate(["x"] * 12, each)]
        found = {pooling: llm.embed(TEXTS, pooling=pooling) for pooling in ("mean", "last")}  # type: ignore[arg-type]
        assert llm.tokenizer is not None
        ids = [llm.tokenizer.encode(text) for text in TEXTS]
    assert all(re.fullmatch("[ab]{3,6}c", o.text) and o.finish_reason == "stop" for o in outputs[1::2])
    with torch.inference_mode():
        for i, prompt in enumerate(ids):
            hidden = oracle.model(torch.tensor([prompt])).last_hidden_state[0].double()
            for pooling, wanted in (("mean", hidden.mean(0)), ("last", hidden[-1])):
                unit = torch.nn.functional.normalize(wanted, dim=0)
                ours = torch.tensor(found[pooling][i], dtype=torch.float64)
                assert torch.allclose(ours, unit, atol=1e-4 if device == "cuda" else 2e-6, rtol=0)
