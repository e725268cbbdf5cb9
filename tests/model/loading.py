"""Models loaded once per test process, for tests that build engines of their own around them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from foretell.kernels import get_kernels
from foretell.model.load import load_model, spec_for
from foretell.model.transformer import Transformer
from foretell.store import resolve
from tests.model import models


@cache
def load(name: str, dtype: torch.dtype) -> Transformer:
    """A model of tests/model/models.py, or of a path, in this dtype."""
    path = models.prepare(name) if name in models.NAMES else Path(name)
    files = resolve(str(path))
    return load_model(files, spec_for(files), get_kernels(), dtype)
