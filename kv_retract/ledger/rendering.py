"""A thread as the model reads it, with the place of every text in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import MessageError, SpanError
from ..types import Interval, Message, SpanRef, TokenSpan
from .encode import Encoding, IntArray
from .locate import Place
from .located import LEFT_OUT, Located


@dataclass(frozen=True, eq=False)
class Rendering:
    """Token ids of a thread and where the parts of its messages stand in them. Made by `Renderer.render`."""

    messages: tuple[Message, ...]
    text: str
    """The rendered template; the ids are its tokens."""
    encoding: Encoding
    find_places: Callable[[], Mapping[Place, Located]]
    """Renders once more, with marks."""
    text_up_to: Callable[[int], str]
    """Renders the messages up to an index, that one included."""

    @cached_property
    def places(self) -> Mapping[Place, Located]:
        """What could be located, or is certainly left out. The template rewrites what is missing here."""
        return self.find_places()

    @property
    def ids(self) -> IntArray:
        """Token ids. Shape: (num_tokens,)."""
        return self.encoding.ids

    def interval(self, ref: SpanRef) -> Interval:
        """Return the tokens that hold any character of a part of a message; edge tokens belong to it.

        Raises:
            SpanError: it is out of range or empty, or the template changed the text so that it cannot be located.
        """
        start, end, length = self._range(ref)
        where = f"message {ref.message}, {_part_name(ref)}"
        located = self._located(ref)
        if located is None or located is LEFT_OUT:
            does = "leaves it out" if located else "rewrites it"
            raise SpanError(
                f"{where}: it cannot be located in the rendered thread, since the chat template {does}; retract "
                "another part, or use a template that keeps it"
            )
        chars = self._characters(ref, located, start, end)
        if chars is None:
            raise SpanError(
                f"{where}: the chat template rewrites it, so characters [{start}, {end}) of {length} cannot be "
                "located; retract the whole part"
            )
        if chars[0] >= chars[1]:
            raise SpanError(
                f"{where}: nothing of characters [{start}, {end}) of {length} is left once rendered; retract a range "
                "that the chat template keeps"
            )
        return self.encoding.interval(*chars)

    def leaves_out(self, ref: SpanRef) -> bool:
        """Return whether the template certainly shows nothing of what `ref` names; `interval` raises there.

        Raises:
            SpanError: it is out of range or empty.
        """
        start, end, _ = self._range(ref)
        located = self._located(ref)
        if located is None or located is LEFT_OUT:
            return located is LEFT_OUT
        chars = self._characters(ref, located, start, end)
        return chars is not None and chars[0] >= chars[1]

    def spans(self) -> tuple[TokenSpan, ...]:
        """Return the place of every content and tool call that could be located, in token order."""
        spans = []
        for (message, part, call), located in self.places.items():
            if located.start < located.end:
                ref = SpanRef(message, "content") if part == "content" else SpanRef(message, "tool_call", call)
                spans.append(TokenSpan(ref, *self.encoding.interval(located.start, located.end)))
        return tuple(sorted(spans, key=lambda s: (s.start, s.end)))

    def end_of(self, message: int) -> int:
        """Return the first token behind everything that is rendered for a message, its end-of-turn included.

        Renders the messages before it once more.

        Raises:
            SpanError: the template writes earlier messages otherwise when later ones follow.
        """
        if not 0 <= message < len(self.messages):
            raise SpanError(f"expected a message from 0 to {len(self.messages) - 1}, got {message!r}")
        try:
            begin = self.text_up_to(message)
        except MessageError as error:
            raise SpanError(f"the end of message {message} cannot be located: {error}") from error
        if not self.text.startswith(begin):
            raise SpanError(
                f"the end of message {message} cannot be located: the chat template renders the messages up to it "
                "otherwise when more follow; use the end of its content"
            )
        return int(np.searchsorted(self.encoding.starts, len(begin), side="left"))

    def _located(self, ref: SpanRef) -> Located | None:
        return self.places.get((ref.message, ref.part, ref.call if ref.part == "tool_call" else 0))

    def _characters(self, ref: SpanRef, located: Located, start: int, end: int) -> Interval | None:
        whole = ref.start == 0 and ref.end is None
        return (located.start, located.end) if whole else located.characters(self.text, start, end)

    def _range(self, ref: SpanRef) -> tuple[int, int, int]:
        if not 0 <= ref.message < len(self.messages):
            raise SpanError(f"expected a message from 0 to {len(self.messages) - 1}, got {ref.message!r}")
        message = self.messages[ref.message]
        if ref.part == "content":
            length = len(message.content)
        elif ref.part != "tool_call":
            raise SpanError(f"expected part 'content' or 'tool_call', got {ref.part!r}")
        elif 0 <= ref.call < len(message.tool_calls):
            length = len(message.tool_calls[ref.call].arguments)
        else:
            raise SpanError(f"message {ref.message} has {len(message.tool_calls)} tool calls, got call {ref.call!r}")
        end = length if ref.end is None else ref.end
        whole_call = ref.part == "tool_call" and ref.start == 0 and ref.end is None
        if not (whole_call or 0 <= ref.start < end <= length):
            raise SpanError(
                f"message {ref.message}, {_part_name(ref)}: expected a range of at least one of its {length} "
                f"characters, got [{ref.start}, {end})"
            )
        return ref.start, end, length


def _part_name(ref: SpanRef) -> str:
    return f"tool call {ref.call}" if ref.part == "tool_call" else "content"
