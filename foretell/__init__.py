"""foretell: an LLM inference engine that knows its own cost.

The public names are loaded on first use, so that ``import foretell`` takes milliseconds and never torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretell.async_llm import AsyncLLM
    from foretell.config import ModelSpec, SchedulerConfig
    from foretell.core.params import SamplingParams
    from foretell.core.structured import StructuredOutput
    from foretell.errors import ForetellError
    from foretell.llm import LLM
    from foretell.output import CompletionOutput, RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "foretell.llm",
    "AsyncLLM": "foretell.async_llm",
    "SamplingParams": "foretell.core.params",
    "StructuredOutput": "foretell.core.structured",
    "RequestOutput": "foretell.output",
    "CompletionOutput": "foretell.output",
    "ForetellError": "foretell.errors",
    "ModelSpec": "foretell.config",
    "SchedulerConfig": "foretell.config",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ForetellError",
    "ModelSpec",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "StructuredOutput",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'foretell' has no attribute {name!r}")
