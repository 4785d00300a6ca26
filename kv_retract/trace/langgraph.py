"""History of LangGraph threads: `StateSnapshot`s as JSON objects, in any order.

A thread that was forked gives one trace per leaf of its checkpoint tree; `Trace.branches` names the others. Messages
may be serialised by `langchain_core.load.dumpd` (`{"lc": 1, ...}`), by `messages_to_dict`
(`{"type": "ai", "data": {...}}`), by `model_dump` (`{"type": "ai", "content": ...}`) or in the OpenAI form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import TraceError
from ..types import Message
from .base import Branch, Trace, TraceProblem
from .chat import messages_from_chat

_ROLES = {
    "human": "user", "user": "user", "ai": "assistant", "assistant": "assistant", "system": "system",
    "developer": "system", "tool": "tool", "function": "tool",
}  # fmt: skip
_THINKING = frozenset({"thinking", "reasoning", "reasoning_content"})
_REPEATS_CALL = frozenset({"tool_use", "tool_call", "function_call", "input_json_delta"})

Snapshots = Sequence[tuple[Mapping[str, Any], str]]
"""Snapshots with the place each was read from."""


def accepts(value: Any) -> bool:
    """Whether a JSON value is a snapshot."""
    return isinstance(value, dict) and isinstance(value.get("values"), dict) and isinstance(value.get("config"), dict)


def read(snapshots: Snapshots) -> Iterator[Trace | TraceProblem]:
    """Yield one trace per leaf of each thread, in the order of the threads and of the leaves in `snapshots`."""
    threads: dict[tuple[str, str], list[tuple[Mapping[str, Any], str]]] = {}
    for snapshot, source in snapshots:
        config = _configurable(snapshot.get("config"))
        thread_id = config.get("thread_id")
        if thread_id is None:
            yield TraceProblem(source=source, message="expected config.configurable.thread_id, got none")
            continue
        threads.setdefault((thread_id, config.get("checkpoint_ns", "")), []).append((snapshot, source))
    for (thread_id, namespace), own in threads.items():
        yield from _thread(f"{thread_id}/{namespace}" if namespace else thread_id, own)


def _thread(thread: str, snapshots: Snapshots) -> Iterator[Trace | TraceProblem]:
    traces: list[Trace] = []
    leaves = _leaves(snapshots)
    for snapshot, source in leaves:
        checkpoint = _configurable(snapshot["config"]).get("checkpoint_id")
        items = snapshot["values"].get("messages")
        if not isinstance(items, list) or not items:
            yield TraceProblem(
                source=source, message="expected a list of messages in values.messages of the newest snapshot, got none"
            )
            continue
        try:
            messages = messages_from_chat([_chat(item, index) for index, item in enumerate(items)])
        except TraceError as error:
            yield TraceProblem(source=source, message=str(error))
            continue
        trace_id = thread if len(leaves) == 1 else f"{thread}@{checkpoint}"
        traces.append(Trace(trace_id=trace_id, messages=messages, source=source, format="langgraph"))
    for trace in traces:
        others = (other for other in traces if other is not trace)
        branches = tuple(
            Branch(trace_id=o.trace_id, shared_messages=_shared(trace.messages, o.messages)) for o in others
        )
        yield Trace(
            trace_id=trace.trace_id,
            messages=trace.messages,
            source=trace.source,
            format=trace.format,
            branches=branches,
        )


def _leaves(snapshots: Snapshots) -> Snapshots:
    parents = {_configurable(snapshot.get("parent_config")).get("checkpoint_id") for snapshot, _ in snapshots}
    leaves: dict[str, tuple[Mapping[str, Any], str]] = {}
    for number, (snapshot, source) in enumerate(snapshots):
        checkpoint = _configurable(snapshot["config"]).get("checkpoint_id")
        if checkpoint is None or checkpoint not in parents:
            leaves.setdefault(checkpoint or f"snapshot-{number}", (snapshot, source))
    return list(leaves.values())


def _shared(a: Iterable[Message], b: Iterable[Message]) -> int:
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def _configurable(config: Any) -> Mapping[str, str]:
    """Return the ids of a config as text; everything else in it does not matter here."""
    inner = config.get("configurable") if isinstance(config, Mapping) else None
    return {k: str(v) for k, v in inner.items() if v is not None} if isinstance(inner, Mapping) else {}


def _chat(item: Any, index: int) -> Any:
    """Bring one message to the OpenAI form."""
    if not isinstance(item, Mapping) or "role" in item:
        return item
    kind, fields = _kind_and_fields(item)
    role = fields.get("role") if kind == "chat" else _ROLES.get(kind)
    if role is None:
        raise TraceError(f"message {index}: expected one of {sorted(_ROLES)} as the type of the message, got {kind!r}")
    message: dict[str, Any] = {"role": role, "name": fields.get("name"), "tool_call_id": fields.get("tool_call_id")}
    message["content"], message["reasoning_content"] = _content(fields)
    calls = [_call(call) for key in ("tool_calls", "invalid_tool_calls") for call in _list(fields.get(key))]
    extra = fields.get("additional_kwargs")
    if not calls and isinstance(extra, Mapping):
        calls = _list(extra.get("tool_calls"))
    return {**message, "tool_calls": calls}


def _kind_and_fields(item: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    fields = item.get("kwargs") if "lc" in item else item.get("data", item)
    fields = fields if isinstance(fields, Mapping) else {}
    if "lc" in item:
        path = item.get("id")
        kind = str(path[-1]) if isinstance(path, list) and path else ""
    else:
        kind = str(item.get("type", ""))
    return kind.removesuffix("Chunk").removesuffix("Message").lower(), fields


def _content(fields: Mapping[str, Any]) -> tuple[Any, str]:
    """Split the blocks of a content: providers repeat the tool calls in them, and put reasoning beside the text."""
    content = fields.get("content")
    extra = fields.get("additional_kwargs")
    reasoning = extra.get("reasoning_content") if isinstance(extra, Mapping) else None
    thoughts = [reasoning] if isinstance(reasoning, str) else []
    if not isinstance(content, list):
        return content, "".join(thoughts)
    blocks = []
    for block in content:
        kind = str(block.get("type")) if isinstance(block, Mapping) else "text"
        if kind in _THINKING:
            thoughts.append(str(block.get("thinking") or block.get("reasoning") or block.get("text") or ""))
        elif kind not in _REPEATS_CALL:
            blocks.append({"type": "text", "text": block} if isinstance(block, str) else block)
    return blocks, "".join(thoughts)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping) or "function" in call:
        return call
    return {"id": call.get("id"), "function": {"name": call.get("name"), "arguments": call.get("args")}}
