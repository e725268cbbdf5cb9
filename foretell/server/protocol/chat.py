"""POST /v1/chat/completions: what clients send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from foretell.server.protocol.base import Request
from foretell.server.protocol.caching import CacheBreakpoint, CacheControl
from foretell.server.protocol.sampling import Natural, SamplingFields

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


class TextPart(Request):
    """Marks for a cache are accepted; prefix caching is automatic here."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    cache_control: CacheControl | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class ForeignPart(Request, extra="allow"):
    """An image, sound, file or link: named, so that it can be refused in one line. Nothing is ever fetched."""

    type: str


Part = Annotated[TextPart | ForeignPart, Field(union_mode="left_to_right")]
Content = str | list[Part]


class CalledFunction(Request):
    name: Name
    arguments: str
    """JSON."""


class CalledTool(Request):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """As streamed answers have it, for clients that send back what they got."""


class ChatMessage(Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name for reasoning_content."""
    type: Literal["text", "message"] | None = None
    """Some clients name what can be nothing else."""
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(Request):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Request):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Request):
    name: Name


class NamedTool(Request):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Natural | None = None
    tools: list[ChatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    """The template spells its special tokens out."""

    # what OpenAI's clients may send along and what changes nothing here
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None
    reasoning_effort: None = None
    verbosity: None = None
    chat_template: None = None
    documents: None = None
    include_reasoning: Literal[True] | None = None
    """Reasoning stands in the text, where the model writes it."""
    mm_processor_kwargs: None = None
