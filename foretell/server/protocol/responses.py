"""POST /v1/responses: what it takes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from foretell.server.protocol.base import Request
from foretell.server.protocol.caching import CacheBreakpoint
from foretell.server.protocol.chat import Name
from foretell.server.protocol.extras import Extras
from foretell.server.protocol.variants import kind_tag, one_or_many, only, unsupported

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Request):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class OutputTextIn(Request):
    """A part of an earlier answer. Its annotations and logprobs are not looked at: no prompt has them."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalIn(Request):
    type: Literal["refusal"]
    refusal: str


_PARTS = only("content of type", "input_text", "output_text", "refusal", hint="send text: nothing is fetched or seen")
Part = Annotated[
    Annotated[InputText, Tag("[input_text]")]
    | Annotated[OutputTextIn, Tag("[output_text]")]
    | Annotated[RefusalIn, Tag("[refusal]")],
    Discriminator(kind_tag),
    BeforeValidator(_PARTS),
]
Content = Annotated[
    Annotated[str, Tag("[one]")] | Annotated[list[Part], Tag("[many]")],
    Discriminator(
        one_or_many, custom_error_type="content", custom_error_message="Input should be text or a list of parts"
    ),
]


class InputMessage(Request):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallIn(Request):
    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutputIn(Request):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    name: str | None = None
    status: Status | None = None


class SummaryTextIn(Request):
    type: Literal["summary_text"]
    text: str


class ReasoningTextIn(Request):
    type: Literal["reasoning_text"]
    text: str


class ReasoningIn(Request):
    """Passed to the model's chat template as the next assistant message's ``reasoning_content``."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryTextIn]
    content: list[ReasoningTextIn] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


_ITEMS = only("input of type", "message", "function_call", "function_call_output", "reasoning", default="message")


def _item_tag(value: Any) -> str:
    return kind_tag(value, "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("[message]")]
    | Annotated[FunctionCallIn, Tag("[function_call]")]
    | Annotated[FunctionCallOutputIn, Tag("[function_call_output]")]
    | Annotated[ReasoningIn, Tag("[reasoning]")],
    Discriminator(_item_tag),
    BeforeValidator(_ITEMS),
]
Input = Annotated[
    Annotated[str, Tag("[one]")] | Annotated[list[InputItem], Tag("[many]")],
    Discriminator(
        one_or_many, custom_error_type="input", custom_error_message="Input should be text or a list of items"
    ),
]


class ResponsesTool(Request):
    """``strict`` asks for arguments that follow ``parameters``."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


Tool = Annotated[ResponsesTool, BeforeValidator(only("the tool", "function"))]


class ResponsesToolName(Request):
    type: Literal["function"]
    name: str


class AllowedTools(Request):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[Annotated[ResponsesToolName, BeforeValidator(only("the tool", "function"))]]


_CHOICES = only("the tool_choice", "function", "allowed_tools", plain=("none", "auto", "required"))


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("[mode]")]
    | Annotated[ResponsesToolName, Tag("[function]")]
    | Annotated[AllowedTools, Tag("[allowed_tools]")],
    Discriminator(lambda value: "[mode]" if isinstance(value, str) else kind_tag(value)),
    BeforeValidator(_CHOICES),
]


class TextFormatIn(Request):
    type: Literal["text"]


class JsonObjectFormatIn(Request):
    type: Literal["json_object"]


class JsonSchemaFormatIn(Request):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[TextFormatIn, Tag("[text]")]
    | Annotated[JsonObjectFormatIn, Tag("[json_object]")]
    | Annotated[JsonSchemaFormatIn, Tag("[json_schema]")],
    Discriminator(kind_tag),
    BeforeValidator(only("the format", "text", "json_object", "json_schema")),
]


class TextConfig(Request):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Request):
    """This server adds no reasoning of its own: only what asks for none is accepted."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponsesStreamOptions(Request):
    """No obfuscation is added, whatever is asked: it would hide nothing on a machine of your own."""

    include_obfuscation: bool | None = None


Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",  # the others name items that no answer of this server has
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class InputTokensRequest(Extras):
    """What a prompt is made of. Fields that shape only the answer do not count."""

    model: str | None = None
    input: Input
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    conversation: Annotated[None, BeforeValidator(unsupported("use previous_response_id"))] = None


class ResponsesRequest(InputTokensRequest):
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Include] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    prompt: Annotated[None, BeforeValidator(unsupported("no prompts are kept here: send the text"))] = None
    background: Literal[False] | None = None  # nothing runs on after its client has left
    # accepted, because what they may say here changes nothing
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None  # counts built-in tools, of which there are none
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
