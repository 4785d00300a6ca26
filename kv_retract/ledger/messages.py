"""Messages in the neutral form to and from OpenAI chat dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast, get_args

from ..errors import MessageError
from ..types import Message, Role, ToolCall

_ROLES = get_args(Role)
_ALIASES = {"developer": "system", "function": "tool"}


def message_from_openai(data: Mapping[str, Any]) -> Message:
    """Read one OpenAI chat message.

    Text only: `content` is a string, null, or a list of text blocks. `developer` counts as `system`, and the older
    `function` role as `tool`.

    Raises:
        MessageError: the role is unknown, or something is not text; the message names it.
    """
    if not isinstance(data, Mapping):
        raise MessageError(f"a message must be an object with role and content, got {type(data).__name__}")
    role = data.get("role")
    role = _ALIASES.get(role, role) if isinstance(role, str) else None
    if role not in _ROLES:
        raise MessageError(f"unknown role {data.get('role')!r}; expected one of {', '.join(_ROLES)}")
    calls = data.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise MessageError(f"tool_calls must be a list, got {type(calls).__name__}")
    return Message(
        role=cast(Role, role),
        content=text_of(data.get("content")),
        tool_calls=tuple(_call(call) for call in calls),
        tool_call_id=_optional(data, "tool_call_id"),
        name=_optional(data, "name"),
        reasoning=text_of(data.get("reasoning_content")),
    )


def message_to_openai(message: Message) -> dict[str, Any]:
    """Write an OpenAI chat message; `message_from_openai` inverts it."""
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.tool_call_id is not None:
        data["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        data["name"] = message.name
    if message.reasoning:
        data["reasoning_content"] = message.reasoning
    return data


def text_of(content: Any) -> str:
    """Join the text of a `content` field: a string, null, or a list of strings and text blocks.

    Raises:
        MessageError: there is something else in it; its type is named.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise MessageError(f"content must be text or a list of text blocks, got {type(content).__name__}")
    texts = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif isinstance(block, Mapping) and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif isinstance(block, Mapping) and block.get("type") == "text" and isinstance(block.get("content"), str):
            texts.append(block["content"])  # AgentDojo's form
        else:
            kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
            raise MessageError(f"content block of type {kind!r} is not text; only text can be rendered")
    return "".join(texts)


def _call(data: Any) -> ToolCall:
    function = data.get("function", data) if isinstance(data, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MessageError(f"a tool call needs function.name and function.arguments, got {data!r:.200}")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=str(data.get("id") or ""), name=function["name"], arguments=arguments)


def _optional(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is None or isinstance(value, str):
        return value
    raise MessageError(f"{key} must be text, got {type(value).__name__}")
