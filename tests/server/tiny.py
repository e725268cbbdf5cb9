"""A model that starts in a moment: dummy weights, a tokenizer of bytes and a few tags, a chat template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from foretell.async_llm import AsyncLLM
from foretell.server.local_engine import LocalTextEngine

TAGS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(TAGS)
CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 258,
    "torch_dtype": "float32",
}


def write_model(folder: Path, template: str = TEMPLATE, **config: Any) -> Path:
    """A model folder without weights: load it with load_format="dummy". ``config`` goes over CONFIG."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    return folder


@cache
def tiny_folder() -> Path:
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="foretell-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_model(folder)


def start_tiny(folder: Path | None = None, **options: Any) -> LocalTextEngine:
    llm = AsyncLLM(
        str(folder or tiny_folder()),
        **{"load_format": "dummy", "dtype": "float32", "kv_cache_bytes": 4 << 20, "max_num_seqs": 16, **options},
    )
    return LocalTextEngine(llm)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """One engine for all tests of a session; its requests are independent of each other by design."""
    engine = start_tiny()
    yield engine
    engine.close()
