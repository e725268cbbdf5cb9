"""GGUF: values against the gguf package, and damage of every kind ending in a ForetellError."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foretell.errors import ForetellError, ModelFormatError, ModelNotFoundError, UnsupportedModelError
from foretell.store.gguf_file import GGUFSource
from foretell.store.gguf_header import GGML_TYPES, read_header

HALVES = {  # where each block keeps float16 scales: random bits there would be NaN or infinite
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_blocks(kind: str, rows: int, blocks_per_row: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    block_bytes = {name: nbytes for name, _, nbytes in GGML_TYPES.values()}[kind]
    data = rng.integers(0, 256, (rows * blocks_per_row, block_bytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.normal(0, 0.1, len(data)).astype(np.float16)
        data[:, at : at + 2] = scales[:, None].view(np.uint8)
    return data.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[Any, str]], alignment: int = 32) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 2)
    writer.add_bool("flag", True)
    writer.add_float32("eps", 1e-5)
    writer.add_uint64("big", 1 << 40)
    writer.add_int32("negative", -3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "", "<|x|>"])
    writer.add_array("scores", [0.5, -1.0])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    weights = np.arange(64, dtype=np.float32).reshape(2, 32)
    quantised: np.ndarray = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    tensors: dict[str, tuple[Any, str]] = {"w": (weights, "F32"), "q": (quantised, "Q8_0")}
    return write(tmp_path / "small.gguf", tensors)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_quantisation_equals_gguf_bit_by_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    rows, blocks = 5, 3
    data = random_blocks(kind, rows, blocks)
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))
    source = GGUFSource(write(tmp_path / "m.gguf", {"pad": (np.ones(3, np.float32), "F32"), "w": (data, kind)}))
    got = source.read("w", dtype)
    assert got.dtype == dtype
    assert got.shape == source.shape("w") == expected.shape
    assert torch.equal(got, expected.to(dtype))
    assert source.quant_type("w") == kind
    assert np.array_equal(source.raw("w").numpy(), data)


def test_blocks_beyond_one_cache_run(tmp_path: Path) -> None:
    data = random_blocks("Q4_1", 700, 32)  # 716,800 weights: more than one run of the dequantiser
    expected = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1))
    source = GGUFSource(write(tmp_path / "m.gguf", {"w": (data, "Q4_1")}))
    assert torch.equal(source.read("w", torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_unquantised_types_and_alignment(tmp_path: Path, alignment: int) -> None:
    weights = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    bf16 = torch.from_numpy(weights).bfloat16()
    tensors = {
        "a": (weights, "F32"),
        "b": (weights.astype(np.float16), "F16"),
        "c": (bf16.view(torch.uint8).numpy(), "BF16"),
    }
    source = GGUFSource(write(tmp_path / "m.gguf", tensors, alignment))
    assert torch.equal(source.read("a", torch.float32), torch.from_numpy(weights))
    assert torch.equal(source.read("b", torch.float16), torch.from_numpy(weights).half())
    assert torch.equal(source.read("c", torch.bfloat16), bf16)
    assert list(source.names()) == ["a", "b", "c"]


def test_metadata_equals_the_gguf_packages_reader(small: Path) -> None:
    reader = gguf.GGUFReader(small)
    ours = read_header(small).metadata
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours) == theirs
    assert ours["tokenizer.ggml.tokens"] == ["a", "ü", "", "<|x|>"]
    for tensor in reader.tensors:
        mine = read_header(small).tensors[tensor.name]
        assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_a_write_never_reaches_the_file(small: Path) -> None:
    before = small.read_bytes()
    GGUFSource(small).read("w", torch.float32).zero_()
    assert small.read_bytes() == before


# --- damage ----------------------------------------------------------------------------------------------


def outcome(path: Path, content: bytes) -> str:
    """Reads everything; "ok", or the message. Any other exception fails the test."""
    path.write_bytes(content)
    try:
        source = GGUFSource(path)
        for name in source.names():
            source.read(name, torch.float32)
    except ForetellError as error:
        message = str(error)
    else:
        return "ok"
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_every_truncation_is_named(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in read_header(small).tensors.values())
    for length in [*range(700), *range(700, end, 13), end - 1]:
        message = outcome(tmp_path / "cut.gguf", whole[:length])
        assert "truncated" in message or length < 24, (length, message)
    assert f"{end - 1} bytes" in message
    assert str(end) in message


def test_every_header_byte_flipped(small: Path, tmp_path: Path) -> None:
    whole = bytearray(small.read_bytes())
    header_end = min(tensor.offset for tensor in read_header(small).tensors.values())
    tracemalloc.start()
    for at in range(header_end):
        for value in (0x00, 0xFF, whole[at] ^ 0x01, whole[at] ^ 0x80):
            damaged = whole.copy()
            damaged[at] = value
            outcome(tmp_path / "flip.gguf", bytes(damaged))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("value", [0, 1, 0xFFFFFFFF, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_huge_counts_anywhere(small: Path, tmp_path: Path, value: int) -> None:
    whole = bytearray(small.read_bytes())
    header_end = min(tensor.offset for tensor in read_header(small).tensors.values())
    tracemalloc.start()
    for at in range(4, header_end - 8, 1 if value > 1 else 3):
        damaged = whole.copy()
        damaged[at : at + 8] = struct.pack("<Q", value)
        outcome(tmp_path / "count.gguf", bytes(damaged))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 1200), st.binary(min_size=1, max_size=9)), min_size=1, max_size=6))
def test_random_damage(small: Path, tmp_path: Path, edits: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(small.read_bytes())
    for at, new in edits:
        damaged[at : at + len(new)] = new
    outcome(tmp_path / "random.gguf", bytes(damaged))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), head=st.sampled_from([b"", b"GGUF", b"GGUF\x03\0\0\0"]))
def test_random_bytes(tmp_path: Path, content: bytes, head: bytes) -> None:
    assert outcome(tmp_path / "noise.gguf", head + content) != "ok"


def header(*parts: bytes, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def record(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


PAD = bytes(4096)
REFUSALS: dict[str, tuple[bytes, type[ForetellError], str]] = {
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), ModelFormatError, "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedModelError, "big-endian"),
    "magic": (b"PK\x03\x04" + PAD, ModelFormatError, "PK"),
    "duplicate key": (
        header(*[text("k") + struct.pack("<IB", 7, 1)] * 2, PAD, pairs=2), ModelFormatError, "appears twice",
    ),
    "key not UTF-8": (
        header(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 7, 1), PAD, pairs=1), ModelFormatError, "UTF-8",
    ),
    "unknown value type": (header(text("k") + struct.pack("<I", 13), PAD, pairs=1), ModelFormatError, "type 13"),
    "nested arrays": (
        header(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40, PAD, pairs=1), ModelFormatError,
        "nests",
    ),
    "alignment 3": (
        header(text("general.alignment") + struct.pack("<II", 4, 3), PAD, pairs=1), ModelFormatError, "power of two",
    ),
    "alignment text": (
        header(text("general.alignment") + struct.pack("<I", 8) + text("32"), PAD, pairs=1), ModelFormatError,
        "power of two",
    ),
    "split": (
        header(text("split.count") + struct.pack("<IH", 2, 3), PAD, pairs=1), UnsupportedModelError,
        "llama-gguf-split",
    ),
    "unknown tensor type": (header(record("w", [32], 99, 0), PAD, tensors=1), ModelFormatError, "type 99"),
    "unread tensor type": (header(record("w", [256], 16, 0), PAD, tensors=1), UnsupportedModelError, "IQ2_XXS"),
    "zero dimension": (header(record("w", [0], 0, 0), PAD, tensors=1), ModelFormatError, "impossible"),
    "no dimensions": (header(record("w", [], 0, 0), PAD, tensors=1), ModelFormatError, "0 dimensions"),
    "five dimensions": (header(record("w", [1] * 5, 0, 0), PAD, tensors=1), ModelFormatError, "5 dimensions"),
    "overflowing product": (
        header(record("w", [1 << 32, 1 << 32], 0, 0), PAD, tensors=1), ModelFormatError, "impossible",
    ),
    "part of a block": (header(record("w", [33], 3, 0), PAD, tensors=1), ModelFormatError, "multiple"),
    "unaligned": (header(record("w", [1], 0, 4), PAD, tensors=1), ModelFormatError, "alignment"),
    "duplicate tensor": (header(record("w", [1], 0, 0), record("w", [1], 0, 32), PAD, tensors=2), ModelFormatError,
                         "appears twice"),
    "overlap": (header(record("a", [32], 0, 0), record("b", [1], 0, 64), PAD, tensors=2), ModelFormatError,
                "overlap"),
    "offset beyond": (header(record("w", [1], 0, 1 << 62), PAD, tensors=1), ModelFormatError, "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_each_violation_says_what_is_wrong(tmp_path: Path, case: str) -> None:
    content, error, words = REFUSALS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        read_header(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        GGUFSource(tmp_path / "none.gguf")
    with pytest.raises(ForetellError):
        GGUFSource(tmp_path)


def test_a_file_that_shrinks_after_opening(small: Path) -> None:
    source = GGUFSource(small)
    small.write_bytes(small.read_bytes()[:400])
    with pytest.raises(ModelFormatError, match="truncated"):
        source.read("w", torch.float32)


def test_alignment_of_one_byte(tmp_path: Path) -> None:
    align = text("general.alignment") + struct.pack("<II", 4, 1)
    head = header(align, record("w", [2], 0, 1), tensors=1, pairs=1)
    (tmp_path / "odd.gguf").write_bytes(head + b"x" + struct.pack("<2f", 1.5, -2.0))
    assert GGUFSource(tmp_path / "odd.gguf").read("w", torch.float32).tolist() == [1.5, -2.0]


def test_importing_the_store_imports_no_torch(run_python: Callable[[str], str]) -> None:
    code = (
        "import sys, foretell.store; print([m for m in ('torch', 'tokenizers', 'httpx', 'gguf') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.fixture
def run_python() -> Callable[[str], str]:
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    return lambda code: subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
