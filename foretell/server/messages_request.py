"""A ``/v1/messages`` request → a conversation, how to answer it, and the message object it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foretell.errors import InvalidRequestError
from foretell.server import answering
from foretell.server.answering import function_tool, json_form
from foretell.server.chat import ChatRequest
from foretell.server.conversation import Conversation, Message
from foretell.server.protocol.anthropic import MessagesRequest
from foretell.server.responses_events import new_id
from foretell.server.sampling import check_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foretell.core.structured import StructuredOutput
    from foretell.server.config import ServerConfig
    from foretell.server.context import Server
    from foretell.server.protocol.anthropic import BlockIn, CountTokensRequest, Texts


def conversation(request: CountTokensRequest) -> list[Message]:
    """The chat messages: the system prompt, then the turns."""
    talk = Conversation()
    if request.system:
        talk.say("system", text_of(request.system))
    for message in request.messages:
        if isinstance(message.content, str):
            _say(talk, message.role, message.content)
        else:
            _add_blocks(talk, message.role, message.content)
    if not any(message["role"] != "system" for message in talk.messages):
        raise InvalidRequestError("messages: there is nothing to answer; send a message of the user")
    return talk.messages


def _say(talk: Conversation, role: str, text: str) -> None:
    if role == "assistant":
        talk.answer(text)
    else:
        talk.say(role, text)


def _add_blocks(talk: Conversation, role: str, blocks: Sequence[BlockIn]) -> None:
    """One message's blocks in their order; neighbouring texts are one text."""
    texts: list[str] = []
    for block in blocks:
        if block.type == "text":
            texts.append(block.text)
            continue
        if texts:
            _say(talk, role, "\n".join(texts))
            texts = []
        if block.type == "tool_result":
            _only(role, "user", block.type)
            talk.result(block.tool_use_id, _result_text(block))
        elif block.type == "tool_use":
            _only(role, "assistant", block.type)
            talk.call(block.id, block.name, block.input)
        else:
            _only(role, "assistant", block.type)
            talk.think(block.thinking)
    if texts or not blocks:
        _say(talk, role, "\n".join(texts))


def _only(role: str, wanted: str, kind: str) -> None:
    if role != wanted:
        raise InvalidRequestError(f"a {kind} block belongs into a message of the {wanted}, not of the {role}")


def _result_text(block: Any) -> str:
    """Templates know no failed results: the text says it."""
    text = text_of(block.content)
    return f"Error: {text}" if block.is_error else text


def text_of(content: Texts) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def continues_answer(messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer, to be gone on with."""
    last = messages[-1]
    if last["role"] != "assistant":
        return False
    if "tool_calls" in last:
        raise InvalidRequestError("the last message calls tools: send their results")
    if last["content"] != last["content"].rstrip() or not last["content"]:
        raise InvalidRequestError("an answer that is to be continued must not be empty or end in white space")
    return True


def chat_request(request: CountTokensRequest, server: Server) -> ChatRequest:
    """What to ask of the engine; ApiError or InvalidRequestError for what is beyond the limits, or makes no sense."""
    talk = conversation(request)
    tools, choice = tools_and_choice(request)
    params = {"structured": _structured(request, server.config)}
    if isinstance(request, MessagesRequest):
        params |= _params(request, server.config)
    made = answering.chat_request(request, server, talk, tools, choice, **params)
    if continues_answer(talk):
        made = replace(made, add_generation_prompt=False, continue_final_message=True)
    return made


def _params(request: MessagesRequest, config: ServerConfig) -> dict[str, Any]:
    stops = request.stop_sequences or ()
    check_count("stop_sequences", len(stops), config.max_stops, "entries")
    check_count("stop_sequences", max(map(len, stops), default=0), config.max_stop_chars, "characters in one")
    return {
        "max_tokens": request.max_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "stop": stops,
    }


def _structured(request: CountTokensRequest, config: ServerConfig) -> StructuredOutput | None:
    form = request.output_config.format if request.output_config else None
    if form is None:
        return None
    return json_form("output_config.format.schema", form.schema_, config)


def tools_and_choice(request: CountTokensRequest) -> tuple[list[dict[str, Any]], Any]:
    """Tools and choice as chat knows them."""
    tools = [_chat_tool(tool) for tool in request.tools or ()]
    choice = request.tool_choice
    if choice is None:
        return tools, "auto"
    if choice.type == "tool":
        return tools, {"name": choice.name}
    return tools, {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _chat_tool(tool: Any) -> dict[str, Any]:
    return function_tool(tool.name, tool.description, tool.input_schema)


def allows_one_call(request: MessagesRequest) -> bool:
    return bool(getattr(request.tool_choice, "disable_parallel_tool_use", False))


def begin_message(model: str) -> dict[str, Any]:
    """The message object before anything is answered."""
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": None,
    }


def usage_of(update: Any) -> dict[str, Any]:
    """Tokens so far. As the interface has it, input_tokens are those that did not come out of the prefix cache."""
    output = update.output
    cached = output.metrics.cached_tokens
    return {
        "input_tokens": len(output.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": len(output.outputs[0].token_ids),
    }


def stop_of(finish_reason: str, update: Any, request: MessagesRequest) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence) in Anthropic's words."""
    answer = update.output.outputs[0]
    if finish_reason == "tool_calls":
        return "tool_use", None
    if finish_reason == "length":
        reached = len(answer.token_ids) >= request.max_tokens
        return ("max_tokens" if reached else "model_context_window_exceeded"), None
    if isinstance(answer.stop_reason, str) and answer.stop_reason in (request.stop_sequences or ()):
        return "stop_sequence", answer.stop_reason
    return "end_turn", None
