"""Where models come from: aliases, package indexes, the hub, folders; weights, tokenizers, chat templates.

Importing this imports neither torch nor a tokenizer library; the functions do, when they need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foretell.errors import ModelNotFoundError
from foretell.store.aliases import ALIASES, DEFAULT_MODEL, Alias
from foretell.store.references import CachedModel, ModelFiles, cached_models, resolve

if TYPE_CHECKING:
    from foretell.store.tensors import TensorSource

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "Alias",
    "CachedModel",
    "ModelFiles",
    "cached_models",
    "open_tensors",
    "resolve",
]


def open_tensors(files: ModelFiles) -> TensorSource:
    """The weights of ``files``, memory-mapped. ModelFormatError when damaged; ModelNotFoundError if it has none."""
    if files.format == "gguf":
        from foretell.store.gguf_file import GGUFSource

        return GGUFSource(files.path)
    if files.format == "safetensors":
        from foretell.store.safetensors_file import SafetensorsSource

        return SafetensorsSource(files.path)
    raise ModelNotFoundError(f"{files.path} holds a configuration but no weights; ask for dummy weights")
