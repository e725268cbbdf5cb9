"""A ``/v1/responses`` request → a conversation, how to answer it, and the response object it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foretell.errors import InvalidRequestError
from foretell.server import answering
from foretell.server.answering import function_tool, json_form
from foretell.server.chat import ChatRequest
from foretell.server.conversation import Conversation, Message, parsed_arguments, read_arguments
from foretell.server.protocol.responses import ResponsesRequest
from foretell.server.responses_events import new_id
from foretell.server.sampling import check_count, refused

if TYPE_CHECKING:
    from foretell.core.structured import StructuredOutput
    from foretell.server.config import ServerConfig
    from foretell.server.context import Server
    from foretell.server.protocol.responses import Content, InputItem, InputTokensRequest

_LOGPROBS = "message.output_text.logprobs"


def conversation(request: InputTokensRequest, previous: Sequence[Message] = ()) -> list[Message]:
    """The chat messages: instructions, then what went before, then this request's input."""
    talk = Conversation(previous)
    if isinstance(request.input, str):
        talk.say("user", request.input)
    else:
        for item in request.input:
            _add(talk, item)
    if not talk.messages:
        raise InvalidRequestError("input is empty: send at least one item")
    if request.instructions is None:
        return talk.messages
    return [{"role": "system", "content": request.instructions}, *talk.messages]


def _add(talk: Conversation, item: InputItem) -> None:
    if item.type == "function_call":
        talk.call(item.call_id, item.name, parsed_arguments(item.arguments, item.call_id))
    elif item.type == "function_call_output":
        talk.result(item.call_id, text_of(item.output))
    elif item.type == "reasoning":
        parts = item.content if item.content else item.summary
        if not parts and item.encrypted_content:
            raise InvalidRequestError("encrypted reasoning cannot be read here: send its summary, or leave it out")
        if parts:
            talk.think("\n".join(part.text for part in parts))
    elif item.role == "assistant":
        talk.answer(text_of(item.content))
    else:
        talk.say("system" if item.role == "developer" else item.role, text_of(item.content))


def text_of(content: Content) -> str:
    """Parts of one message, one under the other."""
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if part.type == "refusal" else part.text for part in content)


def chat_request(request: InputTokensRequest, previous: Sequence[Message], server: Server) -> ChatRequest:
    """What to ask of the engine; ApiError or InvalidRequestError for what is beyond the limits, or makes no sense."""
    tools, choice = tools_and_choice(request)
    params = {"structured": _structured(request, server.config)}
    if isinstance(request, ResponsesRequest):
        params |= _params(request, server.config)
    return answering.chat_request(request, server, conversation(request, previous), tools, choice, **params)


def _params(request: ResponsesRequest, config: ServerConfig) -> dict[str, Any]:
    wants_logprobs = _LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    check_count("top_logprobs", request.top_logprobs or 0, config.max_logprobs)
    return {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "max_tokens": request.max_output_tokens,
        "logprobs": (request.top_logprobs or 0) if wants_logprobs else None,
    }


def _structured(request: InputTokensRequest, config: ServerConfig) -> StructuredOutput | None:
    form = request.text.format if request.text else None
    if form is None or form.type == "text":
        return None
    return json_form("text.format.schema", None if form.type == "json_object" else form.schema_, config)


def tools_and_choice(request: InputTokensRequest) -> tuple[list[dict[str, Any]], Any]:
    """Tools as chat knows them, less those that ``allowed_tools`` leaves out, and the choice."""
    tools = [_chat_tool(tool) for tool in request.tools or ()]
    choice: Any = request.tool_choice or "auto"
    if isinstance(choice, str):
        return tools, choice
    if choice.type == "function":
        return tools, {"name": choice.name}
    known, allowed = {tool["function"]["name"] for tool in tools}, {tool.name for tool in choice.tools}
    for name in sorted(allowed - known):
        raise refused("tool_choice", f"tool_choice names {name[:64]!r}, which is not among the tools")
    return [tool for tool in tools if tool["function"]["name"] in allowed], choice.mode


def _chat_tool(tool: Any) -> dict[str, Any]:
    return function_tool(tool.name, tool.description, tool.parameters)


def begin_response(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """The response object before anything is answered; it repeats what was asked."""
    text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
    tools = [
        {"description": None, "parameters": None, **tool.model_dump(exclude_none=True)}
        for tool in request.tools or ()
    ]
    choice = request.tool_choice or "auto"
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **text},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [{"strict": None, **tool} for tool in tools],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def usage_of(update: Any) -> dict[str, Any]:
    """Tokens of the whole request so far."""
    output = update.output
    prompt, answer = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": output.metrics.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + answer,
    }


def answer_messages(response: dict[str, Any]) -> list[Message]:
    """A response's output as chat messages, for a request that goes on from it."""
    talk = Conversation()
    for item in response["output"]:
        if item["type"] == "message":
            talk.answer(item["content"][0]["text"])
        else:
            talk.call(item["call_id"], item["name"], read_arguments(item["arguments"]))
    return talk.messages
