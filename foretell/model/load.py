"""From model files to a transformer, tensor by tensor: read, cast, pack, free."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch

from foretell.config import ModelSpec
from foretell.errors import ConfigError
from foretell.kernels.base import Kernels
from foretell.model.build import Builder, Progress
from foretell.model.device_weights import DeviceDummyWeights, DeviceFileWeights
from foretell.model.spec import spec_for
from foretell.model.transformer import Transformer
from foretell.model.weights import DummyWeights, FileWeights, Weights
from foretell.store import ModelFiles, open_tensors

if TYPE_CHECKING:
    from foretell.store.tensors import TensorSource

__all__ = ["DTYPES", "load_dummy", "load_model", "resolve_dtype", "spec_for"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL_FLOAT32_BYTES = 200_000_000


def resolve_dtype(name: str, files: ModelFiles) -> torch.dtype:
    """The dtype to keep weights in. "auto" is bfloat16, except for small checkpoints in float32 alone:
    those lose nothing worth saving by staying what they are."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ConfigError(f"dtype {name!r} is not known: choose auto, {', '.join(DTYPES)}")
    if files.format == "none" or files.size_bytes >= SMALL_FLOAT32_BYTES:
        return torch.bfloat16
    source = open_tensors(files)
    stored = {_stored_as(source, name) for name in source.names()}
    return torch.float32 if stored == {"F32"} else torch.bfloat16


def _stored_as(source: TensorSource, name: str) -> str:
    from foretell.store.gguf_file import GGUFSource
    from foretell.store.safetensors_file import SafetensorsSource

    if isinstance(source, GGUFSource):
        return source.quant_type(name)
    return source.stored_dtype(name) if isinstance(source, SafetensorsSource) else "?"


def load_model(
    files: ModelFiles | TensorSource,
    spec: ModelSpec,
    kernels: Kernels,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    activation_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    layers: range | None = None,
    keep_quantised: bool = False,
    quantization: str | None = None,
) -> Transformer:
    """The model of this spec, its weights kept in ``dtype`` (norms and biases in float32).

    ``keep_quantised``: weights that the kernels can use as the file has them stay so. ``quantization``: the format
    that linear layers are rounded to. ``layers`` limits it to a pipeline stage. Peak memory is the packed weights
    plus about one tensor.
    Raises ModelFormatError naming the tensor that is missing, misshaped, unexpected or not finite.
    """
    source = open_tensors(files) if isinstance(files, ModelFiles) else files
    on_gpu = device is not None and device.type == "cuda"
    weights = DeviceFileWeights(source, spec, device) if on_gpu and device else FileWeights(source, spec)
    builder = Builder(
        spec,
        weights,
        kernels,
        dtype,
        activation_dtype=activation_dtype,
        device=device,
        layers=layers,
        progress=progress,
        keep_quantised=keep_quantised,
        quantization=quantization,
    )
    return build_from(weights, builder)


def build_from(weights: Weights, builder: Builder) -> Transformer:
    """What the builder makes of its weights, or of its share of them; those for a device are on their way before it
    asks for the first, unless it reads parts of them."""
    if not isinstance(weights, DeviceFileWeights):
        return builder.build()
    with closing(weights):
        if builder.weights is weights:
            weights.start(builder.reads(), builder.dtype)
        model = builder.build()
        weights.check()
    return model


def load_dummy(
    spec: ModelSpec,
    kernels: Kernels,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    activation_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    layers: range | None = None,
    quantization: str | None = None,
) -> Transformer:
    """The model of this spec with small random weights: as much memory and work as a real one."""
    on_gpu = device is not None and device.type == "cuda"
    weights = DeviceDummyWeights(spec, seed, device) if on_gpu and device else DummyWeights(spec, seed)
    return Builder(
        spec,
        weights,
        kernels,
        dtype,
        activation_dtype=activation_dtype,
        device=device,
        layers=layers,
        quantization=quantization,
    ).build()
