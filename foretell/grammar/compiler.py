"""Forms → matchers: compiled once, outside the engine's step, and kept for those who ask for the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from foretell.core.structured import StructuredOutput
from foretell.errors import ForetellError, InvalidRequestError, OverloadedError
from foretell.grammar.guard import GrammarGuard
from foretell.grammar.limits import CACHE_BYTES, CACHE_ENTRIES, parser_limits
from foretell.grammar.matcher import FormMatcher
from foretell.grammar.vocabulary import build_vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from foretell.store import Tokenizer

MAX_WAITING: Final = 64  # different forms


class GrammarCompiler:
    """Compiles for one model. ``compile`` and ``submit`` may be called from any thread.

    A form is compiled in a guarded process first, which has limits on time and memory, then here. Costs nothing
    until the first form comes; that one waits for the vocabulary (0.3 to 2 s).
    """

    def __init__(self, load_tokenizer: Callable[[], Tokenizer | None], vocab_size: int) -> None:
        """``load_tokenizer`` is called when the first form comes; ``vocab_size`` is the model's."""
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._end_ids: tuple[int, ...] = ()
        self._vocabulary: LLTokenizer | None = None
        self._guard = GrammarGuard()
        self._kept: OrderedDict[StructuredOutput, tuple[LLMatcher | str, int]] = OrderedDict()  # or its error
        self._kept_bytes = 0
        self._lock = threading.Lock()  # of what is kept
        self._compiling = threading.Lock()
        self._waiting: dict[StructuredOutput, list[Future[None]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="foretell-grammar")

    def compile(self, form: StructuredOutput) -> None:
        """Make a form ready for ``matcher``. Raises InvalidRequestError, in one line, if it cannot be used."""
        self._compiled(form)

    def submit(self, form: StructuredOutput) -> Future[None]:
        """``compile`` in a thread of the compiler's own, once for all who wait for the same; done at once for a form
        that is ready, or known as bad. Cannot be cancelled. Raises OverloadedError when too many forms wait."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        with self._lock:
            kept = self._kept.get(form)
            first = kept is None and form not in self._waiting
            if first and len(self._waiting) >= MAX_WAITING:
                raise OverloadedError("too many grammars wait to be compiled: try again", 1.0)
            if kept is None:
                self._waiting.setdefault(form, []).append(done)
        if kept is not None:
            _settle([done], InvalidRequestError(kept[0]) if isinstance(kept[0], str) else None)
        elif first:
            try:
                self._pool.submit(self._work, form)
            except RuntimeError:  # shut down
                self._settle_all()
        return done

    def matcher(self, form: StructuredOutput, output_ids: Sequence[int] = ()) -> FormMatcher:
        """A matcher at the beginning of an output, or after these tokens of it. Quick for a form that is ready."""
        return FormMatcher(self._compiled(form).deep_copy(), self._vocab_size, self._end_ids, output_ids)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._guard.close()
        self._settle_all()

    def _work(self, form: StructuredOutput) -> None:
        error: Exception | None = None
        try:
            self._compiled(form)
        except Exception as found:  # told to those who wait
            error = found
        with self._lock:
            waiting = self._waiting.pop(form, [])
        _settle(waiting, error)

    def _settle_all(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for futures in waiting.values():
            _settle(futures, ForetellError("the engine was closed"))

    def _compiled(self, form: StructuredOutput) -> LLMatcher:
        found = self._find(form)
        if found is None:
            with self._compiling:
                found = self._find(form)
                if found is None:
                    found, size = self._compile(form)
                    self._keep(form, found, size)
        if isinstance(found, str):
            raise InvalidRequestError(found)
        return found

    def _compile(self, form: StructuredOutput) -> tuple[LLMatcher | str, int]:
        from llguidance import LLMatcher

        if self._vocabulary is None:
            tokenizer = self._load_tokenizer()
            if tokenizer is None:
                raise InvalidRequestError("this model has no tokenizer: structured output needs one")
            self._end_ids = tuple(sorted(tokenizer.eos_token_ids))
            self._vocabulary = build_vocabulary(tokenizer, self._vocab_size, self._end_ids)
        try:
            text, size = self._guard.check(form)
        except InvalidRequestError as error:
            return str(error), len(form.value)
        matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=parser_limits())
        if matcher.is_error():
            lines = matcher.get_error().splitlines() or [""]
            return f"the {form.kind} cannot be used with this model's tokens: {lines[0][:300]}", len(form.value)
        return matcher, len(form.value) + size

    def _find(self, form: StructuredOutput) -> LLMatcher | str | None:
        with self._lock:
            kept = self._kept.get(form)
            if kept is None:
                return None
            self._kept.move_to_end(form)
            return kept[0]

    def _keep(self, form: StructuredOutput, found: LLMatcher | str, size: int) -> None:
        with self._lock:
            self._kept[form] = (found, size)
            self._kept_bytes += size
            while len(self._kept) > 1 and (len(self._kept) > CACHE_ENTRIES or self._kept_bytes > CACHE_BYTES):
                _, (_, freed) = self._kept.popitem(last=False)
                self._kept_bytes -= freed


def _settle(futures: Sequence[Future[None]], error: Exception | None) -> None:
    for future in futures:
        if error is None:
            future.set_result(None)
        else:  # an error of its own for each who may raise it
            future.set_exception(type(error)(str(error)) if isinstance(error, ForetellError) else error)
