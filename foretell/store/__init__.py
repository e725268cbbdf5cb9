"""Where models come from: aliases, package indexes, the hub, folders; weights, tokenizers, chat templates.

Importing this imports neither torch nor a tokenizer library; the functions do, when they need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import ModelNotFoundError
from foretell.store.aliases import ALIASES, DEFAULT_MODEL, Alias
from foretell.store.references import CachedModel, ModelFiles, cached_models, resolve

if TYPE_CHECKING:
    from foretell.store.detokenize import IncrementalDetokenizer
    from foretell.store.tensors import TensorSource
    from foretell.store.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ALIASES",
    "DEFAULT_MODEL",
    "Alias",
    "CachedModel",
    "IncrementalDetokenizer",
    "ModelFiles",
    "Tokenizer",
    "cached_models",
    "load_tokenizer",
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


_LAZY: Final = {
    "IncrementalDetokenizer": "foretell.store.detokenize",
    "Tokenizer": "foretell.store.tokenizer",
    "load_tokenizer": "foretell.store.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
