"""ReAct logs in plain text: `Question:`, then `Thought n:`, `Action n:`, `Observation n:` (Yao et al., 2210.03629).

`Action 2: Search[Nick Park]` becomes a call of `Search` with `{"input": "Nick Park"}`; the thought is the content of
that assistant message. A new `Question:` begins a new trace. `Finish[...]` ends it: what the grader wrote after it is
left out, as the model never read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ..types import Message, ToolCall
from .base import Trace

_FIELD = re.compile(r"^(?:(Question):|(Thought|Action|Observation) (\d+):)[ \t]?", re.MULTILINE)
_ACTION = re.compile(r"\s*(?P<name>[A-Za-z_][\w ]*)\[(?P<input>.*)\]\s*$", re.DOTALL)
# Section lines of a log with several trials; they belong to no question.
_SECTION = re.compile(r"\n(?:#{5,}|-{5,} ?BEGIN |BEGIN TRIAL ).*\Z", re.DOTALL)


def accepts(text: str) -> bool:
    """Whether a text looks like such a log."""
    return re.search(r"^Thought \d+:", text, re.MULTILINE) is not None and "\nAction " in text


def read(text: str, path: str, stem: str) -> Iterator[Trace]:
    """Yield one trace per question."""
    fields = list(_FIELD.finditer(text))
    starts = [i for i, match in enumerate(fields) if match[1]] or [0]
    line, counted = 1, 0
    for number, (first, last) in enumerate(zip(starts, [*starts[1:], len(fields)], strict=True)):
        line += text.count("\n", counted, fields[first].start())
        counted = fields[first].start()
        parts = []
        for i in range(first, last):
            end = fields[i + 1].start() if i + 1 < len(fields) else len(text)
            value = _SECTION.sub("", text[fields[i].end() : end])
            parts.append((fields[i][1] or fields[i][2], fields[i][3] or "0", value.strip()))
        messages = tuple(_messages(parts))
        yield Trace(trace_id=f"{stem}-{number}", messages=messages, source=f"{path}:{line}", format="react")


def _messages(parts: list[tuple[str, str, str]]) -> Iterator[Message]:
    thought = ""
    call: ToolCall | None = None
    finished = False
    for kind, number, value in parts:
        if kind == "Question":
            yield Message(role="user", content=value)
        elif kind == "Thought":
            if thought:
                yield Message(role="assistant", content=thought)
            thought = value
        elif kind == "Action":
            call = _call(value, number)
            finished = call.name == "Finish"
            yield Message(role="assistant", content=thought, tool_calls=(call,))
            thought = ""
        elif call is not None and not finished:
            yield Message(role="tool", content=value, tool_call_id=call.id, name=call.name)
            call = None
    if thought:
        yield Message(role="assistant", content=thought)


def _call(value: str, number: str) -> ToolCall:
    match = _ACTION.match(value)
    name, text = (match["name"].strip(), match["input"]) if match else (value.split("[", 1)[0].strip() or "act", value)
    return ToolCall(f"call_{number}", name, json.dumps({"input": text}, ensure_ascii=False))
