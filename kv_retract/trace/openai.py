"""OpenAI chat messages, one trace per JSON value; tau-bench writes them with the key `traj`."""

from __future__ import annotations

from typing import Any

from ..errors import TraceError
from .base import Trace
from .chat import is_chat, messages_from_chat

_MESSAGE_KEYS = ("messages", "traj", "conversation")
_ID_KEYS = ("trace_id", "thread_id", "conversation_id", "id", "uuid")


def accepts(value: Any) -> bool:
    """Whether a JSON value is a trace of this form."""
    return is_chat(value) or (isinstance(value, dict) and any(isinstance(value.get(k), list) for k in _MESSAGE_KEYS))


def read(value: Any, source: str, default_id: str) -> Trace:
    """Build the trace.

    Raises:
        TraceError: a message is malformed, or there is none.
    """
    if isinstance(value, list):
        return Trace(trace_id=default_id, messages=messages_from_chat(value), source=source, format="openai")
    items = next(value[key] for key in _MESSAGE_KEYS if isinstance(value.get(key), list))
    if not items:
        raise TraceError("expected at least one message, got an empty list")
    tools = value.get("tools")
    return Trace(
        trace_id=_trace_id(value, default_id),
        messages=messages_from_chat(items),
        source=source,
        format="openai",
        tools=tuple(tool for tool in tools if isinstance(tool, dict)) if isinstance(tools, list) else (),
    )


def _trace_id(value: dict[str, Any], default_id: str) -> str:
    if "task_id" in value and "trial" in value:  # tau-bench
        return f"task-{value['task_id']}-trial-{value['trial']}"
    named = next((value[key] for key in _ID_KEYS if isinstance(value.get(key), str | int)), None)
    return default_id if named is None else str(named)
