"""The slash commands of a conversation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.cli import units
from foretell.cli.chat_session import ChatSession
from foretell.cli.guard import say
from foretell.cli.session import sampling, visible
from foretell.errors import ForetellError, InvalidRequestError

FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
INTS = ("max_tokens", "min_tokens", "top_k", "seed")
SETTABLE = (*FLOATS, *INTS, "stop")
_ROLES = ("system", "user", "assistant")
_MAX_FILE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Command:
    run: Callable[[ChatSession, str], None]
    usage: str
    help: str


def run_command(session: ChatSession, line: str) -> bool:
    """Obey a line that starts with a slash; False when it asks to leave. Mistakes are said, never fatal."""
    name, _, argument = line[1:].partition(" ")
    if name in ("quit", "exit", "q"):
        return False
    command = COMMANDS.get(name)
    if command is None:
        say(f"no command /{name}: /help lists them (start a message with a space to send a slash)")
        return True
    try:
        command.run(session, argument.strip())
    except ForetellError as error:
        say(f"error: {error}")
    return True


def _help(session: ChatSession, argument: str) -> None:
    for command in COMMANDS.values():
        print(f"  {command.usage:<20} {command.help}")
    print(f"  {'/quit':<20} leave; so does Ctrl-D")
    print("  A backslash at the end of a line continues it. Ctrl-C stops an answer.")


def _reset(session: ChatSession, argument: str) -> None:
    session.messages.clear()
    say("(a new conversation)")


def _system(session: ChatSession, argument: str) -> None:
    session.system = argument or None
    say("(system message set)" if argument else "(no system message)")


def _history(session: ChatSession, argument: str) -> None:
    for message in session.conversation():
        print(f"{message['role']}: {visible(str(message['content']))}")
    if not session.conversation():
        say("(nothing said yet)")


def _undo(session: ChatSession, argument: str) -> None:
    question = session.undo()
    say("(nothing to undo)" if question is None else f"(forgotten: {question[:60]})")


def _retry(session: ChatSession, argument: str) -> None:
    before = list(session.messages)
    question = session.undo()
    if question is None:
        say("(nothing to retry)")
        return
    session.ask(question)
    if len(session.messages) < len(before):  # refused or stopped at once: what was there stays
        session.messages = before


def _set(session: ChatSession, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if name not in SETTABLE or not value.strip():
        raise InvalidRequestError(f"/set NAME VALUE, with NAME one of {', '.join(SETTABLE)}")
    wanted = session.params | {name: _value(name, value.strip())}
    if wanted[name] is None:
        del wanted[name]
    sampling(**wanted)  # raises if it is out of range, and then nothing changes
    session.params = wanted
    say(f"({name} = {wanted.get(name, 'default')})")


def _value(name: str, text: str) -> Any:
    """None, written "none" or "default", goes back to the default."""
    if text.lower() in ("none", "default"):
        return None
    if name == "stop":
        return [text]
    try:
        return float(text) if name in FLOATS else int(text)
    except ValueError:
        raise InvalidRequestError(f"{name} wants a number, got {text[:40]!r}") from None


def _params(session: ChatSession, argument: str) -> None:
    effective = sampling(**session.params)
    for name in SETTABLE:
        mark = "*" if name in session.params else " "
        print(f" {mark} {name:<20} {getattr(effective, name)!r}")
    say("(* given by you; /set NAME VALUE changes, /set NAME default resets)")


def _stats(session: ChatSession, argument: str) -> None:
    totals, assembly = session.totals, session.llm.assembly
    speed = totals.decoded_tokens / totals.decode_seconds if totals.decode_seconds else None
    rows = {
        "model": f"{assembly.files.name}, {assembly.dtype}, {assembly.kernels} kernels",
        "turns": f"{totals.turns} in {time.monotonic() - session.started:.0f} s",
        "prompt tokens": f"{totals.prompt_tokens:,}, {totals.cached_tokens:,} of them from the prefix cache",
        "output tokens": f"{totals.output_tokens:,} at {units.rate(speed)}",
        "context": f"{totals.context_tokens:,} of {assembly.max_model_len:,} tokens",
        "KV cache": f"{units.binary_bytes(totals.kv_bytes)} of {units.binary_bytes(assembly.kv_bytes)}",
        "weights": units.binary_bytes(assembly.weight_bytes),
        "start-up": f"{sum(assembly.phases.values()):.2f} s",
    }
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


def _path(argument: str) -> Path:
    if not argument:
        raise InvalidRequestError("name a file: /save talk.json, /load talk.json")
    return Path(argument).expanduser()


def _save(session: ChatSession, argument: str) -> None:
    path = _path(argument)
    talk = {"system": session.system, "params": session.params, "messages": session.messages}
    try:
        path.write_text(json.dumps(talk, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}") from None
    say(f"(saved {len(session.messages)} messages in {path})")


def _load(session: ChatSession, argument: str) -> None:
    """All or nothing: the file is checked before the present conversation is given up."""
    path = _path(argument)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidRequestError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB; is it a conversation?")
        talk = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{path} is no JSON file written by /save") from None
    if not isinstance(talk, dict) or not _is_conversation(talk.get("messages")):
        raise InvalidRequestError(f"{path} holds no conversation written by /save")
    system, given = talk.get("system"), talk.get("params")
    params = {k: v for k, v in given.items() if k in SETTABLE} if isinstance(given, dict) else session.params
    try:
        sampling(**params)
    except TypeError:
        raise InvalidRequestError(f"{path} holds parameters of a wrong type") from None
    session.params, session.messages = params, talk["messages"]
    session.system = system if isinstance(system, str) else None
    say(f"(loaded {len(session.messages)} messages from {path})")


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in messages
    )


COMMANDS = {
    "help": Command(_help, "/help", "this list"),
    "reset": Command(_reset, "/reset", "forget the conversation; the system message stays"),
    "system": Command(_system, "/system TEXT", "set the system message; without TEXT remove it"),
    "history": Command(_history, "/history", "what was said so far"),
    "undo": Command(_undo, "/undo", "forget the last question and its answer"),
    "retry": Command(_retry, "/retry", "ask the last question again"),
    "set": Command(_set, "/set NAME VALUE", "change a sampling parameter: /set temperature 0.7"),
    "params": Command(_params, "/params", "the sampling parameters"),
    "stats": Command(_stats, "/stats", "tokens, speed, context and memory so far"),
    "save": Command(_save, "/save FILE", "write the conversation as JSON"),
    "load": Command(_load, "/load FILE", "go on with a saved conversation"),
}
