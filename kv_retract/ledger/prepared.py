"""Messages as chat templates expect them: checked, without anything that looks like a special token, with marks or not.

A thread is rendered anew at every step, and all but its newest messages were rendered before: what depends on one
message alone is remembered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ..errors import MessageError
from ..types import Message
from .encode import Guard
from .locate import CALLS, Style, arguments_of, mark_call, mark_content
from .marks import Marks
from .recent import Recent

MOST_CHARACTERS = 1 << 22
"""Characters of messages that are remembered; each message counts as `_OVERHEAD` more."""
_OVERHEAD = 256

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a message that can be rendered."""

    digest: str
    data: Mapping[str, Any] | None
    """As chat templates expect it, not to be changed; None where something in it looks like a special token."""


class Preparer:
    """Checks messages and remembers what came of it. Safe to share between threads.

    Args:
        pattern: finds the special-token strings of the tokenizer.
        most: characters to remember.
    """

    def __init__(self, pattern: re.Pattern[str], most: int = MOST_CHARACTERS) -> None:
        self._pattern = pattern
        self._recent: Recent[Message, Prepared] = Recent(most)
        self._tools: Recent[str, list[Any]] = Recent(most)

    def prepare(self, messages: Sequence[Message]) -> list[Prepared]:
        """Return what is known of each message.

        Raises:
            MessageError: there is no message, or a text is not valid Unicode.
        """
        if not messages:
            raise MessageError(
                "expected at least one message, got none; begin the thread with a system or user message"
            )
        return [prepared or self._prepared(i, messages[i]) for i, prepared in enumerate(self._recent.find(messages))]

    def tools(self, tools: Tools, text: str, guard: Guard) -> list[Any]:
        """Return tools as chat templates expect them; what looks like a special token in them is hidden by `guard`.

        Args:
            tools: not to be changed, nor what is returned.
            text: JSON of them.
            guard: of the rendering.
        """
        [known] = self._tools.find([text])
        if known is None:
            before = len(guard)
            known = guard.hide(list(tools))
            if len(guard) == before:
                self._tools.keep([(text, known, len(text))])
        return known

    def _prepared(self, number: int, message: Message) -> Prepared:
        calls = (text for call in message.tool_calls for text in (call.id, call.name, call.arguments))
        texts = (message.content, message.reasoning, message.name or "", message.tool_call_id or "", *calls)
        for text in texts:
            check_unicode(text, f"message {number} ({message.role})")
        guard = Guard(self._pattern, "")
        data = _for_template(message, guard)
        prepared = Prepared(message.digest(), None if len(guard) else data)
        self._recent.keep([(message, prepared, _OVERHEAD + sum(map(len, texts)))])
        return prepared


@dataclass(frozen=True, slots=True)
class Source:
    """What is rendered: once as it is, once or more with marks."""

    messages: Sequence[Message]
    prepared: Sequence[Prepared]
    added: Mapping[int, str]
    """Text behind the contents of messages, hidden already."""
    guard: Guard

    def for_template(self, style: Style | None = None, marks: Marks | None = None) -> list[Mapping[str, Any]]:
        """Return the messages as chat templates expect them."""
        return [self._message(i, style, marks) for i in range(len(self.messages))]

    def _message(self, number: int, style: Style | None, marks: Marks | None) -> Mapping[str, Any]:
        message, known = self.messages[number], self.prepared[number].data
        if known is None or (style and marks):
            data = _for_template(message, self.guard)
            if style and marks:
                self._mark(data, number, style, marks)
        elif number not in self.added:
            return known
        else:
            data = dict(known)
        data["content"] += self.added.get(number, "")
        return data

    def _mark(self, data: dict[str, Any], number: int, style: Style, marks: Marks) -> None:
        message = self.messages[number]
        if message.role in style.groups:
            data["content"] = mark_content(message.content, number, style, marks, self.guard.hide)
        if CALLS in style.groups:
            for at, call in enumerate(data.get("tool_calls", ())):
                mark_call(call["function"], number, at, marks)


def nonce_of(prepared: Sequence[Prepared], tools: str, notices: Mapping[int, str]) -> str:
    """Hash everything that is rendered: nothing in it can contain the hash."""
    seed = [tools, *(p.digest for p in prepared), *(f"{i} {n}" for i, n in notices.items())]
    return sha256("\0".join(seed).encode()).hexdigest()[:24]


def check_added(count: int, tools: Tools | None, text: str, notices: Mapping[int, str]) -> None:
    """Raise MessageError where a tool or a notice is not valid Unicode, or a notice is for no message.

    Args:
        count: of the messages.
        tools: what the template lists.
        text: JSON of them, ASCII only.
        notices: text by message.
    """
    for i, text in notices.items():
        if not 0 <= i < count:
            raise MessageError(f"expected notices for messages 0 to {count - 1}, got one for {i!r}")
        check_unicode(text, f"the notice for message {i}")
    if r"\ud" in text:  # half a pair, or a pair
        check_unicode(json.dumps(tools, ensure_ascii=False, default=str), "a tool's description")


def check_unicode(text: str, where: str) -> None:
    """Raise MessageError where a text holds a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MessageError(
            f"{where} is not valid Unicode: lone surrogate at character {error.start}; pass it through "
            "text.encode('utf-8', 'replace').decode() first"
        ) from error


def _for_template(message: Message, guard: Guard) -> dict[str, Any]:
    hide = guard.hide
    data: dict[str, Any] = {"role": message.role, "content": hide(message.content)}
    if message.tool_calls:
        data["tool_calls"] = [
            {
                "id": hide(call.id),
                "type": "function",
                "function": {"name": hide(call.name), "arguments": hide(arguments_of(call))},
            }
            for call in message.tool_calls
        ]
    optional = {
        "tool_call_id": message.tool_call_id, "name": message.name, "reasoning_content": message.reasoning or None,
    }  # fmt: skip
    data.update({key: hide(value) for key, value in optional.items() if value is not None})
    return data
