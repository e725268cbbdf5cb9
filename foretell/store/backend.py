"""The tokenizer library's failures, which are plain Exceptions or panics, as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from foretell.errors import ForetellError, ModelFormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PROBES = ("", "Aa 1é漢\n")


def probe(backend: Backend) -> None:
    """Let what would panic at the first prompt (a frame of tokens that are nowhere) do so now. A vocabulary that
    cannot spell the probes is none of that: it may be one of words."""
    for text in PROBES:
        with contextlib.suppress(Exception):
            backend.decode(backend.encode(text).ids)


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """ModelFormatError saying that ``where`` is no valid tokenizer, for whatever the library raises inside."""
    try:
        yield
    except ForetellError:
        raise
    except BaseException as error:
        # A panic of the library's Rust code derives from BaseException, and has no name to be imported by.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = (str(error).splitlines() or [""])[0][:200]
        raise ModelFormatError(f"{where} is no valid tokenizer ({why}); fetch it again") from None
