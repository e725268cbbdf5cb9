"""Small files that other people wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from foretell.errors import ModelFormatError

_MAX_CONFIG_BYTES: Final = 16 << 20


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a small file; None when there is no such file. ModelFormatError when it is damaged."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelFormatError(f"{path} is larger than {_MAX_CONFIG_BYTES >> 20} MiB; is it a configuration?")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelFormatError(f"{path} is no valid JSON; fetch it again") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} holds no JSON object; fetch it again")
    return value
