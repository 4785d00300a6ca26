"""SWE-agent trajectories (`.traj`): a JSON object with `history`.

Both generations are read alike, whether the model wrote text or called functions. An assistant entry becomes a
message with its thought as content and one tool call named by the first word of its action; the observation after it
becomes that call's tool message. The arguments are `{"command": <action>}` plus `"path"` where the observation, the
action or the file opened last tells which file the command is about, so that views and edits of a file can be
matched. Demonstrations (`is_demo`) are left out, as they are not part of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import TraceError
from ..types import Message, Role, ToolCall
from .base import Trace

_OPEN_FILE = re.compile(r"^\(Open file: (?P<path>[^\r\n]+)\)", re.MULTILINE)
_FILE_COMMANDS = frozenset({"open", "create", "edit", "goto", "scroll_up", "scroll_down", "insert", "append"})
_NAMES_FILE = frozenset({"open", "create"})
_NO_FILE = "n/a"


def accepts(value: Any) -> bool:
    """Whether a JSON value is a trajectory."""
    return isinstance(value, dict) and isinstance(value.get("history"), list)


def read(value: Mapping[str, Any], source: str, default_id: str) -> Trace:
    """Build the trace.

    Raises:
        TraceError: an entry of the history is malformed, or there is none.
    """
    entries = [entry for entry in value["history"] if not (isinstance(entry, Mapping) and entry.get("is_demo"))]
    if not entries:
        raise TraceError("expected entries in history, got none but demonstrations")
    run = _Run()
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str):
            raise TraceError(f"history entry {index}: expected an object with a role, got {type(entry).__name__}")
        run.add(entry, _text(entry.get("content"), index))
    name = value.get("environment")
    instance = value.get("instance_id")
    trace_id = instance if isinstance(instance, str) else default_id
    if not isinstance(instance, str) and isinstance(name, str) and name not in ("main", "swe_main", ""):
        trace_id = f"{name}/{default_id}"
    return Trace(trace_id=trace_id, messages=tuple(run.finish()), source=source, format="swe_agent")


@dataclass
class _Run:
    """The messages so far, the action that waits for its observation, and the file that is open."""

    messages: list[Message] = field(default_factory=list)
    action: str | None = None
    thought: str = ""
    open_file: str | None = None

    def add(self, entry: Mapping[str, Any], content: str) -> None:
        role = entry["role"]
        if role == "assistant":
            self.finish()
            action = entry.get("action")
            if isinstance(action, str) and action.strip():
                thought = entry.get("thought")
                self.action, self.thought = action.strip(), thought if isinstance(thought, str) else content
            else:
                self.messages.append(Message(role="assistant", content=content))
        elif self.action is not None and role in ("user", "tool"):
            self._observe(content)
        else:
            known: dict[str, Role] = {"system": "system", "tool": "user", "user": "user"}
            if role not in known:
                raise TraceError(f"expected role system, user, assistant or tool, got {role!r}")
            self.messages.append(Message(role=known[role], content=content))

    def finish(self) -> list[Message]:
        """Write down an action that nobody answered."""
        if self.action is not None:
            self.messages.append(self._call(None))
            self.action = None
        return self.messages

    def _observe(self, observation: str) -> None:
        shown = _OPEN_FILE.findall(observation)
        path = shown[-1].strip() if shown and shown[-1].strip() != _NO_FILE else None
        call = self._call(path)
        self.open_file = path or self.open_file
        self.messages += [call, _result(call, observation)]
        self.action = None

    def _call(self, shown: str | None) -> Message:
        action = self.action or ""
        name = action.split(None, 1)[0]
        arguments = {"command": action}
        if name in _FILE_COMMANDS:
            path = shown or (_first_argument(action) if name in _NAMES_FILE else None) or self.open_file
            if path is not None:
                arguments["path"] = path
        call = ToolCall(f"call_{len(self.messages)}", name, json.dumps(arguments, ensure_ascii=False))
        return Message(role="assistant", content=self.thought.strip(), tool_calls=(call,))


def _result(call: Message, observation: str) -> Message:
    answered = call.tool_calls[0]
    return Message(role="tool", content=observation, tool_call_id=answered.id, name=answered.name)


def _first_argument(action: str) -> str | None:
    words = action.split("\n", 1)[0].split()
    return words[1].strip("\"'") if len(words) > 1 else None


def _text(content: Any, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(b, Mapping) and isinstance(b.get("text"), str) for b in content):
        return "".join(block["text"] for block in content)
    raise TraceError(f"history entry {index}: expected text or blocks of text as content, got {type(content).__name__}")
