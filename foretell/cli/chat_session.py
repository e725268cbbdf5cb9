"""The state of a conversation and one turn of it. What the user types is read elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foretell.cli import units
from foretell.cli.guard import say
from foretell.cli.session import TextOut, sampling
from foretell.errors import ForetellError, InvalidRequestError

if TYPE_CHECKING:
    from foretell.llm import LLM
    from foretell.output import RequestOutput

Message = dict[str, Any]


@dataclass(slots=True)
class Totals:
    """Of all turns so far; ``decode_seconds`` leaves the first tokens out, as TPOT does."""

    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    context_tokens: int = 0
    kv_bytes: int = 0


@dataclass(slots=True)
class ChatSession:
    """Messages so far (without the system message, which stands apart so that /reset keeps it)."""

    llm: LLM
    params: dict[str, Any]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    started: float = field(default_factory=time.monotonic)

    def check_model(self) -> None:
        """InvalidRequestError unless the model can chat."""
        tokenizer = self.llm.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer, so it cannot chat: use foretell run --ids")
        if not tokenizer.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template (a base model): use foretell run to complete a text"
            )

    def conversation(self) -> list[Message]:
        """What the chat template gets."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def ask(self, text: str) -> None:
        """One turn: the answer streams to stdout, its cost goes to stderr. A refused message is forgotten."""
        accepted = self.llm.now  # TTFT counts the chat template and the tokeniser too
        self.messages.append({"role": "user", "content": text})
        try:
            token_ids = self.llm.chat_token_ids(self.conversation())
            self._check_room(len(token_ids))
            self._answer(token_ids, accepted)
        except ForetellError as error:
            self.messages.pop()
            say(f"error: {error}")

    def _check_room(self, prompt_tokens: int) -> None:
        limit = self.llm.assembly.max_model_len
        if prompt_tokens >= limit:
            raise InvalidRequestError(
                f"the context is full: with this message the conversation has {prompt_tokens:,} tokens and the "
                f"model takes {limit:,}; the message was dropped. /undo forgets the last turn, /reset all of them"
            )

    def _answer(self, token_ids: list[int], accepted: float) -> None:
        """Stream until the end or Ctrl-C; what was said by then stays in the conversation."""
        out, text, output = TextOut(), [], None
        stopped = False
        stream = self.llm.stream(token_ids, sampling(**self.params), arrival=accepted)
        try:
            for update in stream:
                output = update.output
                text.append(update.delta_text)
                out.write(update.delta_text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            stream.close()  # type: ignore[attr-defined]  # a generator: closing it aborts the request at once
        out.end_line()
        if output is None:  # stopped before the first token: as if never asked
            self.messages.pop()
            say("(stopped)")
            return
        if output.outputs[0].error is not None:
            raise ForetellError(output.outputs[0].error)
        self.messages.append({"role": "assistant", "content": "".join(text)})
        self._note_end(output, stopped)

    def _note_end(self, output: RequestOutput, stopped: bool) -> None:
        """The line under an answer, and why it ended if not of itself."""
        metrics, completion = output.metrics, output.outputs[0]
        prompt, answer = len(output.prompt_token_ids), len(completion.token_ids)
        totals = self.totals
        totals.turns += 1
        totals.prompt_tokens += prompt
        totals.cached_tokens += metrics.cached_tokens
        totals.output_tokens += answer
        totals.decoded_tokens += max(0, answer - 1)
        totals.decode_seconds += (metrics.tpot_seconds or 0.0) * max(0, answer - 1)
        totals.context_tokens = prompt + answer
        totals.kv_bytes = metrics.kv_bytes
        speed = None if metrics.tpot_seconds is None else 1 / metrics.tpot_seconds
        limit = self.llm.assembly.max_model_len
        say(
            f"[TTFT {units.seconds(metrics.ttft_seconds)} · {answer} tokens at {units.rate(speed)} · "
            f"prompt {prompt}, {metrics.cached_tokens} from the prefix cache · context {prompt + answer} of {limit}]"
        )
        if stopped:
            say("(stopped; the answer so far is kept)")
        elif completion.finish_reason == "length" and prompt + answer >= limit:
            say(f"(the context of {limit:,} tokens is full: /undo forgets the last turn, /reset all of them)")
        elif completion.finish_reason == "length":
            say(f"(cut at max_tokens {self.params.get('max_tokens')}: /set max_tokens N gives longer answers)")

    def undo(self) -> str | None:
        """Forget the last turn; the question that was asked in it, or None if there was none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return str(message["content"])
        return None
