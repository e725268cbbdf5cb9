"""POST /v1/messages and /v1/messages/count_tokens: what they take, in Anthropic's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from foretell.server.protocol.base import Request
from foretell.server.protocol.caching import CacheControl
from foretell.server.protocol.chat import Name
from foretell.server.protocol.extras import Extras
from foretell.server.protocol.variants import kind_tag, one_or_many, only, unsupported


class TextBlockIn(Request):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[None, BeforeValidator(unsupported("nothing is cited"))] = None


class DirectCaller(Request):
    type: Literal["direct"]


class ToolUseBlockIn(Request):
    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: None = None


class ThinkingBlockIn(Request):
    """Passed to the model's chat template as the message's ``reasoning_content``. There are no signatures here."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


_HINT = "send text: nothing is fetched or seen"


def _texts(what: str) -> Any:
    return Discriminator(
        one_or_many, custom_error_type="content", custom_error_message=f"Input should be text or a list of {what}"
    )


Text = Annotated[TextBlockIn, BeforeValidator(only("content of type", "text", hint=_HINT))]
Texts = Annotated[Annotated[str, Tag("[one]")] | Annotated[list[Text], Tag("[many]")], _texts("text blocks")]


class ToolResultBlockIn(Request):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


BlockIn = Annotated[
    Annotated[TextBlockIn, Tag("[text]")]
    | Annotated[ToolUseBlockIn, Tag("[tool_use]")]
    | Annotated[ToolResultBlockIn, Tag("[tool_result]")]
    | Annotated[ThinkingBlockIn, Tag("[thinking]")],
    Discriminator(kind_tag),
    BeforeValidator(only("content of type", "text", "tool_use", "tool_result", "thinking", hint=_HINT)),
]
Content = Annotated[Annotated[str, Tag("[one]")] | Annotated[list[BlockIn], Tag("[many]")], _texts("content blocks")]


class MessageIn(Request):
    role: Literal["user", "assistant", "system"]
    content: Content


class MessagesTool(Request):
    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None  # arguments are streamed as they come in any case
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    input_examples: Annotated[None, BeforeValidator(unsupported("put examples into the description"))] = None


AnyTool = Annotated[MessagesTool, BeforeValidator(only("the tool", "custom", default="custom"))]


class AutoChoice(Request):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(Request):
    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceByName(Request):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class NoneChoice(Request):
    type: Literal["none"]


ToolChoice = Annotated[
    AutoChoice | AnyChoice | ToolChoiceByName | NoneChoice,
    Field(discriminator="type"),
    BeforeValidator(only("the tool_choice", "auto", "any", "tool", "none")),
]


class NoThinking(Request):
    type: Literal["disabled"]


class AdaptiveThinking(Request):
    """Leaves it to the model, and no model here thinks apart from its text."""

    type: Literal["adaptive"]
    display: Literal["summarized", "omitted"] | None = None


Thinking = Annotated[
    NoThinking | AdaptiveThinking,
    Field(discriminator="type"),
    BeforeValidator(only("thinking", "disabled", "adaptive", hint="no budget is kept for thinking here")),
]


class MessagesMetadata(Request):
    user_id: str | None = None


class OutputFormatIn(Request):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Request):
    format: Annotated[OutputFormatIn, BeforeValidator(only("the format", "json_schema"))] | None = None
    effort: Literal["high"] | None = None
    """The interface's default; a model here has one effort."""


class KeepThinking(Request):
    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(Request):
    """Nothing is taken out of a conversation here: only what asks for nothing to be is accepted."""

    edits: list[Annotated[KeepThinking, BeforeValidator(only("the edit", "clear_thinking_20251015"))]] | None = None


class CountTokensRequest(Extras):
    """What a prompt is made of. Everything that shapes only the answer may be there too, and does not count."""

    model: str
    messages: Annotated[list[MessageIn], Field(min_length=1)]
    system: Texts | None = None
    tools: list[AnyTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None
    speed: Literal["standard"] | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: dict[str, Any] | None = None  # refused in words that clients understand: they go on without one
    container: Annotated[None, BeforeValidator(unsupported("nothing is run here"))] = None
    diagnostics: Annotated[None, BeforeValidator(unsupported("see /metrics for the prefix cache"))] = None
    inference_geo: Annotated[None, BeforeValidator(unsupported("it runs where the server runs"))] = None
