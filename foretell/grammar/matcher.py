"""One output on its way through its form: which tokens may come next, and whether it is complete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from foretell.grammar.limits import STEP_SECONDS, TOTAL_SECONDS, TOTAL_SECONDS_PER_TOKEN

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray


class FormMatcher:
    """``ended``: the output is complete, no token but an end token may follow. ``error``: the form became too
    costly to follow; the request cannot go on."""

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, end_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_ids = [i for i in end_ids if i < vocab_size]
        self._words = np.zeros((vocab_size + 1 + 31) // 32, dtype=np.uint32)  # one bit per token
        self._seconds = 0.0
        self._accepted = 0  # tokens
        self.longest_seconds = 0.0  # CPU time of the costliest step so far
        self.error = ""
        self.ended = False
        for token in output_ids:
            self.accept(token)

    def allowed(self) -> NDArray[np.bool_]:
        """[vocab] of the tokens that may come next; none when the form has ended for a model without end tokens."""
        started = time.thread_time()
        if not self.error:
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            if self._matcher.is_error():
                self._fail(self._matcher.get_error())
        self._spend(time.thread_time() - started)
        return np.unpackbits(self._words.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)

    def only_ends(self, allowed: NDArray[np.bool_]) -> bool:
        """Whether nothing but an end token may come."""
        return int(np.count_nonzero(allowed)) == int(np.count_nonzero(allowed[self._end_ids]))

    def accept(self, token_id: int) -> None:
        """Go on with a token that ``allowed`` allowed."""
        if self.error or self.ended:
            return
        started = time.thread_time()
        self._accepted += 1
        if not self._matcher.consume_token(token_id):
            self._fail(self._matcher.get_error())
        elif self._matcher.is_stopped():
            self.ended = True
        self._spend(time.thread_time() - started)

    def _spend(self, seconds: float) -> None:
        """One request's form must not hold up the others in its batch for long."""
        self._seconds += seconds
        self.longest_seconds = max(self.longest_seconds, seconds)
        if seconds > STEP_SECONDS or self._seconds > TOTAL_SECONDS + self._accepted * TOTAL_SECONDS_PER_TOKEN:
            self._fail("it takes too much time")

    def _fail(self, why: str) -> None:
        self._words[:] = 0
        if not self.error:
            lines = why.splitlines() or [""]
            self.error = f"the form of the output is too complex to follow ({lines[0][:200]}): make it simpler"
