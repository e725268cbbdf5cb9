"""What a chat client sends → the messages and tools that a chat template understands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foretell.server.errors import ApiError
from foretell.server.limits import parse_json
from foretell.server.protocol.chat import ChatMessage, ForeignPart, NamedTool, TextPart
from foretell.server.sampling import check_count, refused
from foretell.server.structured import check_tools_size

if TYPE_CHECKING:
    from foretell.server.chat import ToolChoice
    from foretell.server.config import ServerConfig
    from foretell.server.protocol.chat import ChatTool


def messages_of(messages: list[ChatMessage], config: ServerConfig) -> list[dict[str, Any]]:
    """Plain messages: contents as text, arguments of earlier tool calls as objects, developer as system."""
    check_count("messages", len(messages), config.max_messages, "entries")
    return [_message(number, message, config) for number, message in enumerate(messages)]


def _message(number: int, message: ChatMessage, config: ServerConfig) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    made["content"] = _text(number, message.content if message.content is not None else message.refusal)
    if message.content is None and message.role not in ("assistant",):
        raise refused(f"messages.{number}.content", f"messages.{number}: a {message.role} message needs a content")
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            made[name] = getattr(message, name)
    if message.reasoning is not None:
        made.setdefault("reasoning_content", message.reasoning)
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(number, call, config)},
            }
            for call in message.tool_calls
        ]
    return made


def _text(number: int, content: str | list[TextPart | ForeignPart] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = []
    for part in content:
        text = (part.text if part.type == "text" else part.refusal) if isinstance(part, TextPart) else None
        if text is None:
            raise refused(f"messages.{number}.content", f"messages.{number}: {_why_no_text(part)}")
        texts.append(text)
    return "\n".join(texts)


def _why_no_text(part: TextPart | ForeignPart) -> str:
    if part.type in ("text", "refusal"):
        return f"a content part of type {part.type!r} holds {part.type} as a string, and marks for a cache at most"
    return (
        f"this model reads text only, and a content part of type {part.type[:40]!r} is none; "
        "nothing is fetched or opened"
    )


def _arguments(number: int, call: Any, config: ServerConfig) -> dict[str, Any]:
    try:
        value = parse_json(call.function.arguments.encode() or b"{}", config.max_json_depth)
    except ApiError:
        value = None
    if not isinstance(value, dict):
        raise refused(
            f"messages.{number}.tool_calls", f"messages.{number}: a tool call's arguments are no JSON object in text"
        )
    return value


def tools_of(
    tools: list[ChatTool] | None, choice: str | NamedTool | None, config: ServerConfig
) -> tuple[list[dict[str, Any]], ToolChoice]:
    """OpenAI's tool objects, and what is chosen among them."""
    made = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    check_count("tools", len(made), config.max_tools, "entries")
    check_tools_size(made, config)
    names = [tool["function"]["name"] for tool in made]
    if len(set(names)) != len(names):
        raise refused("tools", "two tools have the same name")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise refused("tool_choice", f"tool_choice names {choice.function.name!r}, which is not among the tools")
        return made, {"name": choice.function.name}
    if choice == "required" and not made:
        raise refused("tool_choice", "tool_choice=required needs tools")
    return made, choice or ("auto" if made else "none")
