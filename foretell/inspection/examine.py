"""What a model is and what it costs, from its configuration or GGUF header alone: no weights, no torch.

The formulas stand in ``foretell.cost.operations`` and the parameter table in ``foretell.model.parameters``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

from foretell.cost.operations import (
    Flops,
    Traffic,
    crossover_tokens,
    decode_flops,
    decode_traffic,
    kv_bytes,
    prefill_flops,
    prefill_traffic,
)
from foretell.errors import ConfigError
from foretell.model.parameters import ParameterCounts, ParameterEstimate, count_parameters, estimate_parameters

if TYPE_CHECKING:
    from foretell.config import ModelSpec
    from foretell.store import ModelFiles

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
SMALL_FLOAT32_BYTES: Final = 200_000_000
BATCH_SIZES: Final = (1, 8, 32)
TYPICAL_TOKENS: Final = 1024  # the prompt and context of the sentences on intensity, where the model goes so far


@dataclass(frozen=True, slots=True)
class StoredType:
    """All tensors of a file that are stored in one way."""

    type: str
    tensors: int
    parameters: int
    bytes: int

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class AtContext:
    """One more token when the sequence is ``context_tokens`` long: operations, and bytes for one sequence."""

    context_tokens: int
    flops: Flops
    traffic: Traffic
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Intensity:
    """Operations per byte moved, of a step over ``tokens`` tokens of one sequence (prefill) or of one token each
    of ``batch_size`` sequences that are ``tokens`` long (decode)."""

    phase: str
    tokens: int
    batch_size: int
    flops: int
    bytes: int

    @property
    def flops_per_byte(self) -> float:
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything ``foretell inspect`` shows. ``dtype`` is what weights and KV cache are taken to be held in."""

    reference: str
    name: str
    path: str
    format: str
    spec: ModelSpec
    dtype: str
    counts: ParameterCounts
    estimate: ParameterEstimate
    stored: tuple[StoredType, ...]
    file_bytes: int
    contexts: tuple[AtContext, ...]
    crossover_tokens: int | None
    prefill: Intensity
    decode: Intensity
    decode_batched: Intensity

    @property
    def bytes_per_element(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def weights_bytes(self) -> int:
        return self.counts.total * self.bytes_per_element

    @property
    def kv_bytes_per_token(self) -> int:
        return self.spec.kv_bytes_per_token(self.bytes_per_element)

    def memory_bytes(self, context_tokens: int, batch_size: int) -> int:
        """Weights and the KV cache of ``batch_size`` sequences of ``context_tokens`` each."""
        return self.weights_bytes + batch_size * kv_bytes(self.spec, context_tokens, self.bytes_per_element)


def inspect_model(files: ModelFiles, dtype: str = "auto") -> Inspection:
    """Read the configuration or GGUF header of ``files`` and work out the rest.

    Raises UnsupportedModelError or ModelFormatError as loading the model would.
    """
    from foretell.model.spec import spec_for

    spec = spec_for(files)
    stored = tuple(stored_types(files))
    name = _dtype(dtype, stored)
    size = DTYPE_BYTES[name]
    typical = min(TYPICAL_TOKENS, spec.max_position_embeddings)
    return Inspection(
        reference=files.reference,
        name=files.name,
        path=str(files.path),
        format=files.format,
        spec=spec,
        dtype=name,
        counts=count_parameters(spec),
        estimate=estimate_parameters(spec),
        stored=stored,
        file_bytes=files.size_bytes,
        contexts=tuple(at_context(spec, n, size) for n in context_lengths(spec.max_position_embeddings)),
        crossover_tokens=crossover_tokens(spec),
        prefill=_prefill_intensity(spec, typical, size),
        decode=decode_intensity(spec, typical, size, 1),
        decode_batched=decode_intensity(spec, typical, size, BATCH_SIZES[-1]),
    )


def _dtype(wanted: str, stored: Sequence[StoredType]) -> str:
    """What the engine would keep the weights in; its rule for "auto" (model/load.py) without its torch."""
    if wanted == "auto":
        small = sum(kind.bytes for kind in stored) < SMALL_FLOAT32_BYTES
        return "float32" if small and [kind.type for kind in stored] == ["F32"] else "bfloat16"
    if wanted not in DTYPE_BYTES:
        raise ConfigError(f"dtype {wanted!r} is unknown: choose one of auto, {', '.join(DTYPE_BYTES)}")
    return wanted


def stored_types(files: ModelFiles) -> list[StoredType]:
    """How the weights lie in the files, largest share first; empty when there are none."""
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for kind, parameters, size in _stored(files):
        totals[kind][0] += 1
        totals[kind][1] += parameters
        totals[kind][2] += size
    return sorted((StoredType(kind, *sums) for kind, sums in totals.items()), key=lambda t: -t.bytes)


def _stored(files: ModelFiles) -> Iterator[tuple[str, int, int]]:
    """(type, parameters, bytes) of each tensor."""
    if files.format == "gguf":
        from foretell.store.gguf_header import read_header

        for tensor in read_header(files.path).tensors.values():
            yield tensor.quant_type, prod(tensor.shape), tensor.nbytes
    elif files.format == "safetensors":
        from foretell.store.safetensors_file import SafetensorsSource

        source = SafetensorsSource(files.path)
        for name in source.names():
            kind, parameters = source.stored_dtype(name), prod(source.shape(name))
            digits = "".join(c for c in kind.partition("_")[0] if c.isdigit())  # F8_E4M3 has 8 bits
            yield kind, parameters, parameters * (int(digits) // 8 if digits else 1)


def context_lengths(longest: int) -> list[int]:
    """About five lengths from 1k (or an eighth of a short context) to the longest, in even steps of 2 or 4."""
    length = min(1024, max(1, longest // 8))
    factor = 2 if longest <= 16 * length else 4
    lengths = []
    while length < longest:
        lengths.append(length)
        length *= factor
    return [*lengths, longest]


def at_context(spec: ModelSpec, tokens: int, bytes_per_element: int) -> AtContext:
    return AtContext(
        tokens,
        decode_flops(spec, tokens),
        decode_traffic(spec, tokens, bytes_per_element),
        kv_bytes(spec, tokens, bytes_per_element),
    )


def decode_intensity(spec: ModelSpec, tokens: int, bytes_per_element: int, batch_size: int) -> Intensity:
    return Intensity(
        "decode",
        tokens,
        batch_size,
        batch_size * decode_flops(spec, tokens).total,
        decode_traffic(spec, tokens, bytes_per_element, batch_size).total,
    )


def _prefill_intensity(spec: ModelSpec, tokens: int, bytes_per_element: int) -> Intensity:
    return Intensity(
        "prefill",
        tokens,
        1,
        prefill_flops(spec, tokens).total,
        prefill_traffic(spec, tokens, bytes_per_element).total,
    )
