"""What executors that compute do for a request before it is added."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import TYPE_CHECKING

from foretell.errors import ForetellError, InvalidRequestError, OverloadedError

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


class Preparing:
    """What another process prepares: futures by number. Who waits for one may leave, but cannot cancel it."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._futures: dict[int, Future[None]] = {}

    def begin(self) -> tuple[int, Future[None]]:
        number, future = next(self._numbers), Future[None]()
        future.set_running_or_notify_cancel()
        self._futures[number] = future
        return number, future

    def end(self, number: int, error: str, *, later: bool) -> None:
        """``error``: why it cannot be, or ""; ``later``: it may be tried again."""
        future = self._futures.pop(number, None)
        if future is None:
            return
        if error:
            future.set_exception(OverloadedError(error, 1.0) if later else InvalidRequestError(error))
        else:
            future.set_result(None)

    def give_up(self) -> None:
        futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(ForetellError("the engine has stopped"))
