"""The two interfaces that can be measured, and what this server understands of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from foretell.errors import ConfigError, ForetellError
from foretell.loadgen.http import HttpClient, HttpError, fetch
from foretell.loadgen.prompts import WORDS, spoken
from foretell.loadgen.stream import StreamReader, error_of_body
from foretell.trace.synthetic import synthetic_tokens
from foretell.trace.workloads import TraceRequest

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
PROBE_SECONDS = 120.0
FEW_WORDS, MANY_WORDS = 16, 80


@dataclass(frozen=True, slots=True)
class Interface:
    """How a request is written. ``ignore_eos`` (an extension that vLLM and most open servers share) makes
    answers as long as asked; ``usage`` asks for the server's own token counts."""

    endpoint: Endpoint
    model: str
    ignore_eos: bool = True
    usage: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    def body(self, prompt: str | list[int], output_len: int) -> bytes:
        request: dict[str, Any] = {"model": self.model, "max_tokens": output_len, "temperature": 0, "stream": True}
        if self.endpoint == "chat":
            request["messages"] = [{"role": "user", "content": prompt}]
        else:
            request["prompt"] = prompt
        if self.ignore_eos:
            request["ignore_eos"] = True
        if self.usage:
            request["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(request | self.extra)


@dataclass(frozen=True, slots=True)
class Probed:
    """What a few requests told before the run. Token figures are None where the server counts nothing."""

    interface: Interface
    tokens_per_word: float | None
    overhead_tokens: float | None
    notes: tuple[str, ...] = ()


async def model_of(client: HttpClient) -> str:
    """The first model the server lists. ConfigError when it lists none."""
    try:
        status, body = await fetch(client, client.target.message("GET", "/v1/models"), seconds=PROBE_SECONDS)
    except (HttpError, TimeoutError) as error:
        raise ForetellError(f"the server cannot be asked for its model: {error or 'no answer in time'}") from None
    if status in (401, 403):
        raise ConfigError(f"the server wants a key (HTTP {status}): give --api-key or set OPENAI_API_KEY")
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise ConfigError(
            f"{client.target.url}/v1/models lists no model (HTTP {status}): name it with --model"
        ) from None


async def probe(client: HttpClient, interface: Interface) -> Probed:
    """Find out what the server understands and how many tokens a word makes. ForetellError if nothing works."""
    notes = []
    asked_ignore_eos = interface.ignore_eos
    plainer = replace(interface, ignore_eos=False)
    for interface in (interface, plainer, replace(plainer, usage=False)):  # noqa: B020
        status, refusal, few = await _ask(client, interface, FEW_WORDS)
        if status not in (400, 422):
            break
    if status != 200:
        raise ForetellError(f"the server refuses a plain request to {interface.path} (HTTP {status}): {refusal}")
    if asked_ignore_eos and not interface.ignore_eos:
        notes.append("the server does not know ignore_eos: answers may be shorter than asked")
    if few is None:
        notes.append("the server counts no tokens in its streams: each chunk with text counts as one token")
        return Probed(interface, None, None, tuple(notes))
    _, _, many = await _ask(client, interface, MANY_WORDS)
    if many is None:
        return Probed(interface, None, None, tuple(notes))
    per_word = (many - few) / (MANY_WORDS - FEW_WORDS)
    if not 0.2 <= per_word <= 20:
        return Probed(interface, None, None, tuple(notes))
    return Probed(interface, per_word, few - FEW_WORDS * per_word, tuple(notes))


async def _ask(client: HttpClient, interface: Interface, words: int) -> tuple[int, str, int | None]:
    """Status, the refusal's text, and the prompt tokens that the server counted for so many words."""
    prompt = spoken(synthetic_tokens(TraceRequest(words, 1), words, len(WORDS)))
    message = client.target.message("POST", interface.path, interface.body(prompt, 1))
    try:
        status, body = await fetch(client, message, seconds=PROBE_SECONDS)
    except TimeoutError:
        raise ForetellError(f"{interface.path} did not answer a short request in {PROBE_SECONDS:g} s") from None
    if status != 200:
        return status, error_of_body(body), None
    reader = StreamReader()
    try:
        reader.push(body, 0.0)
    except (ValueError, msgspec.DecodeError) as error:
        raise ForetellError(f"{interface.path} answers with no event stream: {error}") from None
    if not reader.token_times and not reader.done:
        raise ForetellError(f"{interface.path} answers with no event stream: {body[:100]!r}")
    return 200, "", None if reader.usage is None else reader.usage.prompt_tokens
