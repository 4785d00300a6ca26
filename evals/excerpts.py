"""What was retracted, as a report shows it: the text, shortened, and what stood around it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from kv_retract.types import Message, SpanRef

_TEXT, _AROUND = 400, 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Excerpt:
    """A span and its surroundings. Texts come from the trace: whoever shows them must escape them."""

    message: int
    """Index of the span's message."""
    role: str
    name: str
    """Of the tool, where it is known."""
    before: str
    """End of what stands before the span in its message."""
    text: str
    after: str
    """Beginning of what stands behind it."""
    num_chars: int
    """Length of the whole span."""
    previous: str
    """Beginning of the message before."""
    following: str
    """Beginning of the message after; empty where the span's was the newest."""


def excerpt(span: SpanRef, messages: Sequence[Message]) -> Excerpt:
    """Cut a span out of its message; `messages` are those of the moment at which it was retracted."""
    message = messages[span.message]
    if span.part == "tool_call":
        call = message.tool_calls[span.call]
        source, name = call.arguments, call.name
        if span.start == 0 and span.end is None:
            source = f"{call.name} {call.arguments}"
    else:
        source, name = message.content, message.name or _called(message, messages)
    end = len(source) if span.end is None else span.end
    return Excerpt(
        message=span.message,
        role=f"{message.role} (call)" if span.part == "tool_call" else message.role,
        name=visible(name),
        before=visible(_tail(source[: span.start])),
        text=visible(_middle(source[span.start : end])),
        after=visible(_head(source[end:])),
        num_chars=end - span.start,
        previous=_line(messages, span.message - 1),
        following=_line(messages, span.message + 1),
    )


def visible(text: str) -> str:
    """Replace characters that would be invisible or reorder the page (controls, direction marks) by their names."""
    return "".join(f"\N{LEFT CEILING}U+{ord(c):04X}\N{RIGHT FLOOR}" if _hides(c) else c for c in text)


def _hides(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co")


def _called(message: Message, messages: Sequence[Message]) -> str:
    calls = (call for m in messages for call in m.tool_calls)
    return next((call.name for call in calls if message.tool_call_id and call.id == message.tool_call_id), "")


def _line(messages: Sequence[Message], index: int) -> str:
    if not 0 <= index < len(messages):
        return ""
    message = messages[index]
    calls = ", ".join(f"{call.name}({call.arguments})" for call in message.tool_calls)
    return visible(f"{message.role}: {_head(' '.join((message.content or calls).split()))}")


def _head(text: str) -> str:
    return text if len(text) <= _AROUND else text[:_AROUND] + " …"


def _tail(text: str) -> str:
    return text if len(text) <= _AROUND else "… " + text[-_AROUND:]


def _middle(text: str) -> str:
    if len(text) <= _TEXT:
        return text
    return f"{text[: _TEXT * 3 // 4]} … {text[-_TEXT // 4 :]}"
