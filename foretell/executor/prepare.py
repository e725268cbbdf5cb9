"""What executors that compute do for a request before it is added."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from foretell.errors import ForetellError, InvalidRequestError

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.grammar.compiler import GrammarCompiler


def prepare_grammar(grammars: GrammarCompiler | None, params: SamplingParams) -> Future[None] | None:
    """Compile the form of the output, if it must have one; the future has the error if that fails."""
    if params.structured is None:
        return None
    try:
        if grammars is None:
            raise InvalidRequestError("structured output is not available in this engine")
        return grammars.submit(params.structured)
    except ForetellError as error:
        refused: Future[None] = Future()
        refused.set_exception(error)
        return refused
