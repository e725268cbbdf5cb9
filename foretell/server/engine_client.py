"""Text in, text out, over an engine in another process: the server's ``TextEngine``.

Tokenising, detokenising, stop strings, deadlines and the bound on the queue are here, in the event loop of the HTTP
process; the engine sees token ids only, and is reached by messages only.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from foretell.assembly import EngineOptions
from foretell.core.checks import check_prompt_len
from foretell.core.messages import Output
from foretell.core.params import SamplingParams
from foretell.cost.operations import kv_bytes
from foretell.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from foretell.prompts import Prompt, PromptPreparer
from foretell.server import wire
from foretell.server.connection import Listener
from foretell.server.engine_port import EnginePort, turn_back, wire_options
from foretell.server.mailbox import Mailbox
from foretell.server.supervisor import ENGINE_COMMAND, Launch, Supervisor, Watch, launch_here
from foretell.server.text_engine import EngineAbout
from foretell.store import load_tokenizer, resolve
from foretell.tracking import Tracker, Tracking, Update

if TYPE_CHECKING:
    from foretell.store import Tokenizer

LONG_PROMPT_CHARS = 4096  # tokenising more than this, some milliseconds, leaves the event loop
COUNTERS = ("steps", "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")


class EngineClient:
    """``await start()`` before anything else. ``max_queue`` bounds unfinished outputs, running ones included.

    Belongs to one event loop. ``command`` starts the engine process; tests and benches have their own.
    """

    about: EngineAbout
    preparer: PromptPreparer
    ready: wire.Ready

    def __init__(
        self,
        options: EngineOptions,
        *,
        max_queue: int = 1024,
        watch: Watch | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
        launch: Launch | None = None,
    ) -> None:
        self.options = options
        self.max_queue = max_queue
        self.tokenizer: Tokenizer | None = None
        self._listener = Listener(self._on_message, self._on_down)
        self.supervisor = Supervisor(
            wire_options(options), self._listener, watch=watch, launch=launch or launch_here(command)
        )
        self._tracking = Tracking(EnginePort(self.supervisor), None)
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix="foretell-tokenizer")
        self._ids = itertools.count()
        self._unfinished = 0
        self._ended: deque[float] = deque(maxlen=64)  # when the last outputs ended: how fast places come free
        self._rest: tuple[list[int], list[int], float] | None = None  # of the last step, not taken yet
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._figures: dict[str, Any] = {}
        self._of_the_dead: dict[str, Any] = dict.fromkeys(COUNTERS, 0) | {"preemptions": {}}
        self._draining = False

    # -- life ---------------------------------------------------------------------------------------

    async def start(self, on_phase: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """Start the engine and wait until it is ready. ForetellError with the reason if it cannot be."""
        self._listener.on_phase = on_phase
        files = await asyncio.to_thread(resolve, self.options.model, offline=self.options.offline)
        loading = asyncio.create_task(asyncio.to_thread(load_tokenizer, files))  # while the engine loads its weights
        try:
            ready = self.ready = await self.supervisor.start()
        finally:
            self.tokenizer = self._tracking.tokenizer = await loading
        spec, element_bytes = ready.spec, ready.kv_element_bytes
        if spec is not None:
            self._tracking.kv_bytes = lambda tokens: kv_bytes(spec, tokens, element_bytes)
        self.preparer = PromptPreparer(self.tokenizer, ready.vocab_size, ready.eos_token_ids, self.options.seed)
        self.about = EngineAbout(
            model=ready.model,
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_tokens_per_request,
            dtype=ready.dtype,
            created=int(time.time()),
        )

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self._draining = True

    def end_all(self, reason: str) -> None:
        """Requests under way end with UnavailableError."""
        self._draining = True
        self._tracking.end_all(lambda: UnavailableError(reason))

    async def close(self, grace_seconds: float = 5.0) -> None:
        """End the engine process; requests under way hear of it."""
        self._draining = True
        await self.supervisor.stop(grace_seconds)
        self._fail_all("the server has been stopped")
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    # -- requests -----------------------------------------------------------------------------------

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """InvalidRequestError if the request could never run; nothing is queued."""
        self.preparer.token_ids(prompt_token_ids)
        self._check_len(prompt_token_ids)
        self.preparer.params(params)

    def _check_len(self, prompt_token_ids: list[int]) -> None:
        check_prompt_len(len(prompt_token_ids), self.ready.max_model_len, self.ready.max_tokens_per_request)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Update]:
        """See ``TextEngine``. A reader that is slower than the engine gets several tokens in one update."""
        arrival = time.monotonic()
        self._admit(params.n)
        self._unfinished += params.n
        tracker: Tracker | None = None
        mailbox = Mailbox()
        deadline = mailbox.fail_after(timeout_seconds)
        try:
            ids = await self._token_ids(prompt)
            self._check_len(ids)
            text = prompt if isinstance(prompt, str) else None
            own = self.preparer.params(params)
            tracker = Tracker(next(self._ids), text, ids, own, mailbox.put, arrival)
            self._tracking.start(tracker, priority)
            open_outputs = params.n
            while open_outputs:
                update = await mailbox.get()
                open_outputs -= update.finish_reason is not None
                yield update
        except TimeoutError:
            raise DeadlineError(f"the request was not finished within {timeout_seconds:g} s") from None
        finally:
            if deadline is not None:
                deadline.cancel()
            if tracker is not None:
                self._tracking.abort(tracker)
            self._unfinished -= params.n
            self._ended.append(time.monotonic())

    async def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str) and len(prompt) > LONG_PROMPT_CHARS:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._tokenizing, self.preparer.token_ids, prompt)
        return self.preparer.token_ids(prompt)

    def _admit(self, outputs: int) -> None:
        if not self.is_running or self._draining:
            state = "shutting down" if self._draining else self.supervisor.state
            raise UnavailableError(f"the engine is {state}: try again in a few seconds")
        if outputs > self.max_queue:
            raise InvalidRequestError(f"n={outputs} is more than the queue of this server holds ({self.max_queue})")
        if self._unfinished + outputs > self.max_queue:
            raise OverloadedError(
                f"{self._unfinished} outputs are unfinished and {self.max_queue} may be: try again later",
                self._retry_after_seconds(),
            )

    def _retry_after_seconds(self) -> float:
        """The time in which, at the pace of late, a tenth of the queue has come free; 1 to 60."""
        if len(self._ended) < 2:
            return 5.0
        per_output = (time.monotonic() - self._ended[0]) / len(self._ended)
        return min(60.0, max(1.0, per_output * self.max_queue / 10))

    # -- what the engine says -----------------------------------------------------------------------

    def _on_message(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Step(now, request_ids, token_ids, news):
                if ahead := self.supervisor.clock_ahead_seconds:
                    now -= ahead
                    turn_back(news, ahead)
                self._take_rest()
                self._tracking.take(news, now)  # first tokens are among them
                self._rest = (request_ids, token_ids, now)
                asyncio.get_running_loop().call_soon(self._take_rest)  # once who waits for its first has been woken
            case wire.Stats(figures):
                self._figures = figures
            case wire.Refused(first_id, text):
                self._tracking.fail_request(first_id, InvalidRequestError(text))
            case wire.Answer(call_id, value, error):
                call = self._calls.pop(call_id, None)
                if call is not None and not call.done():
                    call.set_result(value) if error is None else call.set_exception(InvalidRequestError(error))

    def _take_rest(self) -> None:
        """The tokens of a step that are no news."""
        if self._rest is None:
            return
        (request_ids, token_ids, now), self._rest = self._rest, None
        self._tracking.take([Output(i, t) for i, t in zip(request_ids, token_ids, strict=True)], now)

    def _on_down(self, reason: str) -> None:
        self._take_rest()
        dead, last = self._of_the_dead, self._figures
        for name in COUNTERS:
            dead[name] += last.get(name, 0)
        dead["preemptions"] = _sums(dead["preemptions"], last.get("preemptions", {}))
        self._figures = {}
        self._fail_all(f"{reason} while it worked on this request: send it again")

    def _fail_all(self, reason: str) -> None:
        self._tracking.fail_all(lambda: UnavailableError(reason))
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.done():
                call.set_exception(UnavailableError(reason))

    # -- administration -----------------------------------------------------------------------------

    async def control(self, command: str, **arguments: Any) -> Any:
        """See ``engine_process.Commands``. A switched policy outlives the engine process."""
        call_id = next(self._ids)
        self.supervisor.send(wire.Control(call_id, command, arguments))
        call = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            value = await call
        finally:
            self._calls.pop(call_id, None)
        if command == "set_policy":
            self.start_with(policy=value["policy"])
        return value

    def start_with(self, **options: Any) -> None:
        """What the next engine process starts with, should this one end."""
        self.supervisor.options = {**self.supervisor.options, **options}

    def stats(self) -> Mapping[str, Any]:
        """``Engine.stats``, at most some moments old; counters go on over restarts. ``unfinished``: outputs here."""
        dead, last = self._of_the_dead, self._figures
        return {
            "running": 0,
            "waiting": 0,
            "kv_usage": 0.0,
            **last,
            **{name: dead[name] + last.get(name, 0) for name in COUNTERS},
            "preemptions": _sums(dead["preemptions"], last.get("preemptions", {})),
            "unfinished": self._unfinished,
            "restarts": self.supervisor.restarts,
            "engine_pid": self.supervisor.pid,
            "host": self.supervisor.host,
            "state": self.supervisor.state,
        }

    @property
    def is_running(self) -> bool:
        return self.supervisor.state == "running"

    @property
    def is_ready(self) -> bool:
        return self.is_running and not self._draining and self._unfinished < self.max_queue

    @property
    def is_healthy(self) -> bool:
        return self.supervisor.silent_seconds < self.supervisor.watch.stall_seconds


def _sums(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}
