"""The architecture of a model on this disk, before any weight is read and without torch."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from foretell.errors import ForetellError, ModelFormatError
from foretell.model.families import resolve_spec, tensor_naming
from foretell.model.gguf_adapter import gguf_spec
from foretell.store import ModelFiles, open_tensors

if TYPE_CHECKING:
    from foretell.config import ModelSpec


def spec_for(files: ModelFiles) -> ModelSpec:
    """The architecture of these files, from config.json or GGUF metadata. Same errors as resolve_spec."""
    if files.format == "gguf":
        return gguf_spec(open_tensors(files))
    if files.config is None:
        raise ModelFormatError(f"{files.name} has no config.json, so its architecture is unknown")
    spec = resolve_spec(files.config)
    if spec.tied_embeddings and files.format == "safetensors" and _head_differs(spec, files):
        return replace(spec, tied_embeddings=False)
    return spec


def _head_differs(spec: ModelSpec, files: ModelFiles) -> bool:
    """Whether the files hold an embedding and another head, although the config ties them: then, as transformers 5
    has it, the config is wrong. A head that repeats the embedding, as many files have, is the embedding."""
    from foretell.store.safetensors_file import SafetensorsSource

    with contextlib.suppress(ForetellError):  # what is wrong with the files is said where they are loaded
        source = SafetensorsSource(files.path)
        naming, names = tensor_naming(spec), source.names()
        embedding, head = naming.sources(spec, names)["embedding.weight"].name, f"{naming.head}.weight"
        return embedding in names and head in names and not source.same_bytes(embedding, head)
    return False
