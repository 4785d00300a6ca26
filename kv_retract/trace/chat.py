"""Chat messages as traces spell them, brought to the OpenAI form and from there to `Message`.

Beside OpenAI's own forms (null content, blocks of content, dictionaries as arguments) this takes legacy
`function_call`, and AgentDojo's blocks `{"type": "text", "content": ...}` and calls `{"function", "args", "id"}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MessageError, TraceError
from ..ledger.messages import message_from_openai
from ..types import Message

_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name")


def is_chat(value: Any) -> bool:
    """Whether a JSON value looks like a list of chat messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def messages_from_chat(items: Sequence[Any]) -> tuple[Message, ...]:
    """Convert a list of messages; a tool result without an id gets that of the first call not answered yet.

    Raises:
        TraceError: an item is not a message; the error names its index.
    """
    messages: list[Message] = []
    waiting: dict[str, None] = {}
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise TraceError(f"message {index}: expected an object with role and content, got {type(item).__name__}")
        plain = _plain(item, index)
        if plain.get("role") == "tool":
            plain["tool_call_id"] = plain.get("tool_call_id") or next(iter(waiting), f"call_{index}")
            waiting.pop(plain["tool_call_id"], None)
        try:
            message = message_from_openai(plain)
        except MessageError as error:
            raise TraceError(f"message {index}: {error}") from error
        if message.role == "assistant":
            waiting = dict.fromkeys(call.id for call in message.tool_calls)
        messages.append(message)
    return tuple(messages)


def _plain(item: Mapping[str, Any], index: int) -> dict[str, Any]:
    plain = {key: item[key] for key in _KEPT if item.get(key) is not None}
    if not isinstance(plain.get("role"), str):
        raise TraceError(f"message {index}: expected a role, got {plain.get('role')!r}")
    if "tool_call_id" in plain:
        plain["tool_call_id"] = str(plain["tool_call_id"])
    reasoning = item.get("reasoning_content") or item.get("reasoning")
    if isinstance(reasoning, str):
        plain["reasoning_content"] = reasoning
    if isinstance(plain.get("content"), list):
        plain["content"] = [_block(block) for block in plain["content"]]
    calls = plain.pop("tool_calls", None) or []
    if not calls and isinstance(item.get("function_call"), Mapping):
        calls = [{"function": item["function_call"]}]
    if not isinstance(calls, list):
        raise TraceError(f"message {index}: expected a list of tool calls, got {type(calls).__name__}")
    if calls:
        plain["tool_calls"] = [_call(call, index, number) for number, call in enumerate(calls)]
    if plain.get("role") == "function":
        plain["role"] = "tool"
    return plain


def _block(block: Any) -> Any:
    if isinstance(block, Mapping) and block.get("type") == "text" and "text" not in block:
        return {"type": "text", "text": block.get("content") or ""}
    return block


def _call(call: Any, index: int, number: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise TraceError(f"message {index}: expected an object as tool call {number}, got {type(call).__name__}")
    function = call.get("function", call)
    if isinstance(function, str):
        function = {"name": function, "arguments": call.get("args", {})}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TraceError(f"message {index}: tool call {number} has no function name, only {sorted(map(str, call))}")
    arguments = function.get("arguments", function.get("args"))
    return {
        "id": str(call.get("id") or f"call_{index}_{number}"),
        "type": "function",
        "function": {"name": function["name"], "arguments": "{}" if arguments is None else arguments},
    }
