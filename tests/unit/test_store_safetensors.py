"""safetensors: values against the safetensors package, and damage ending in a ForetellError."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from foretell.errors import ForetellError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from foretell.store.safetensors_file import INDEX_NAME, SafetensorsSource

TENSORS = {
    "model.a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "model.b": torch.linspace(-1, 1, 8).bfloat16(),
    "model.c": torch.tensor(2.5, dtype=torch.float16),
}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def sharded(folder: Path) -> Path:
    save_file({"model.a": TENSORS["model.a"]}, folder / "model-1.safetensors")
    save_file({"model.b": TENSORS["model.b"], "model.c": TENSORS["model.c"]}, folder / "model-2.safetensors")
    write_index(folder, {"model.a": "model-1.safetensors", "model.b": "model-2.safetensors",
                         "model.c": "model-2.safetensors"})  # fmt: skip
    return folder


def test_a_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    assert sorted(source.names()) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name, tensor.dtype), tensor)
        assert source.read(name, torch.float64).dtype == torch.float64
    assert source.stored_dtype("model.b") == "BF16"
    with pytest.raises(KeyError):
        source.shape("none")


def test_shards(tmp_path: Path) -> None:
    source = SafetensorsSource(sharded(tmp_path))
    for name, tensor in TENSORS.items():
        assert torch.equal(source.read(name, tensor.dtype), tensor)


def test_shards_without_an_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX_NAME).unlink()
    assert sorted(SafetensorsSource(tmp_path).names()) == sorted(TENSORS)


def test_the_index_rules_over_stray_files(tmp_path: Path) -> None:
    save_file({"model.a": TENSORS["model.a"] + 1}, sharded(tmp_path) / "consolidated.safetensors")
    assert torch.equal(SafetensorsSource(tmp_path).read("model.a", torch.float32), TENSORS["model.a"])


def test_a_name_in_two_files_without_an_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    save_file(TENSORS, tmp_path / "y.safetensors")
    with pytest.raises(ModelFormatError, match=r"x\.safetensors and in y\.safetensors"):
        SafetensorsSource(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"model-2\.safetensors"):
        SafetensorsSource(tmp_path)


def test_an_index_naming_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"model.z": "model-1.safetensors", "model.a": "model-1.safetensors"})
    with pytest.raises(ModelFormatError, match=r"model\.z"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "../x.safetensors"}, {"a": "/etc/passwd"}, {"a": "x.bin"}, {"a": "sub/x.safetensors"}, {"a": 3}, [], None],
)
def test_an_index_pointing_out_of_the_folder(tmp_path: Path, weight_map: Any) -> None:
    write_index(sharded(tmp_path), weight_map)
    with pytest.raises(ModelFormatError):
        SafetensorsSource(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        SafetensorsSource(tmp_path)


def build(entries: Any, data: bytes = bytes(64)) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets),
    }


BAD: dict[str, tuple[bytes, type[ForetellError], str]] = {
    "empty": (b"", ModelFormatError, "0 bytes"),
    "header longer than file": (struct.pack("<Q", 1 << 60) + b"{}", ModelFormatError, "truncated"),
    "not JSON": (build(b"{nope"), ModelFormatError, "JSON"),
    "a list": (build([]), ModelFormatError, "object"),
    "deep nesting": (build(b"[" * 100_000), ModelFormatError, "JSON"),
    "duplicate": (build(b'{"a": 1, "a": 2}'), ModelFormatError, "twice"),
    "no dtype": (build({"a": {"shape": [2], "data_offsets": [0, 8]}}), ModelFormatError, "lacks"),
    "one offset": (build({"a": entry(offsets=(0,))}), ModelFormatError, "lacks"),
    "unknown dtype": (build({"a": entry("F8_E4M3")}), UnsupportedModelError, "F8_E4M3"),
    "dtype a list": (build({"a": entry(["F32"])}), UnsupportedModelError, "F32"),
    "negative": (build({"a": entry(shape=(-2,))}), ModelFormatError, "natural"),
    "fraction": (build({"a": entry(shape=(2.0,))}), ModelFormatError, "natural"),
    "true": (build({"a": entry(shape=(True, 2))}), ModelFormatError, "natural"),
    "shape a text": (build({"a": entry(shape="22")}), ModelFormatError, "natural"),
    "wrong size": (build({"a": entry(shape=(3,))}), ModelFormatError, "12 bytes"),
    "overflow": (build({"a": entry(shape=(1 << 62, 1 << 62))}), ModelFormatError, "bytes, and has 8"),
    "beyond": (build({"a": entry(shape=(32,), offsets=(0, 128))}), ModelFormatError, "truncated"),
    "overlap": (build({"a": entry(), "b": entry(offsets=(4, 12))}), ModelFormatError, "overlap"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_violation_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, error, words = BAD[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        SafetensorsSource(tmp_path)
    assert "\n" not in str(caught.value)


def outcome(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    try:
        source = SafetensorsSource(folder)
        for name in source.names():
            source.read(name, torch.float32)
    except ForetellError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelFormatError):
            SafetensorsSource(tmp_path)


def test_every_header_byte_flipped(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in range(header_end):
        for value in (0x00, 0xFF, whole[at] ^ 0x01, ord("9"), ord('"')):
            damaged = bytearray(whole)
            damaged[at] = value
            outcome(tmp_path, bytes(damaged))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5))
def test_random_damage(tmp_path: Path, edits: list[tuple[int, bytes]]) -> None:
    if not (tmp_path / "whole").exists():
        save_file(TENSORS, tmp_path / "whole")
    damaged = bytearray((tmp_path / "whole").read_bytes())
    for at, new in edits:
        damaged[at : at + len(new)] = new
    outcome(tmp_path, bytes(damaged))
