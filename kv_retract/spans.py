"""Arithmetic on spans: ranges of characters in a message part, and intervals of tokens. All half-open."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from .errors import SpanError
from .types import Interval, Message, Part, SpanRef

MessagePart: TypeAlias = tuple[int, Part, int]
"""Message, its content or one of its calls, and which call."""


def check_span(span: SpanRef, messages: Sequence[Message]) -> int:
    """Return the length of the part that a span lies in, in characters.

    Raises:
        SpanError: no such message or part, or the range is not inside of it.
    """
    numbers = (span.message, span.call, span.start, 0 if span.end is None else span.end)
    if not all(isinstance(number, int) for number in numbers):
        raise SpanError(f"expected integers for message, call, start and end, got {span!r}")
    if not 0 <= span.message < len(messages):
        raise SpanError(f"expected a message from 0 to {len(messages) - 1}, got {span.message!r}")
    message = messages[span.message]
    if span.part == "content":
        length = len(message.content)
    elif span.part == "tool_call":
        if not 0 <= span.call < len(message.tool_calls):
            raise SpanError(
                f"message {span.message} ({message.role}) has {len(message.tool_calls)} tool calls, "
                f"got call {span.call!r}"
            )
        length = len(message.tool_calls[span.call].arguments)
    else:
        raise SpanError(f"expected part 'content' or 'tool_call', got {span.part!r}")
    end = length if span.end is None else span.end
    if not 0 <= span.start <= end <= length:
        raise SpanError(
            f"expected a range inside of the {length} characters of message {span.message} ({span.part}), "
            f"got [{span.start!r}, {span.end!r})"
        )
    return length


def part_of(span: SpanRef) -> MessagePart:
    """Return which part of which message a span lies in; of a content the number of the call counts for nothing."""
    return span.message, span.part, span.call if span.part == "tool_call" else 0


def extent(span: SpanRef, messages: Sequence[Message]) -> Interval:
    """Return the characters of a span that is there; the name of a call counts as the character before its arguments.

    So a whole call is (-1, length).
    """
    message = messages[span.message]
    if span.part == "content":
        return span.start, len(message.content) if span.end is None else span.end
    length = len(message.tool_calls[span.call].arguments)
    if span.start == 0 and span.end is None:
        return -1, length
    return span.start, length if span.end is None else span.end


def overlap(one: SpanRef, other: SpanRef) -> bool:
    """Whether two spans of the same messages share a character."""
    if part_of(one) != part_of(other):
        return False
    starts, ends = (one.start, other.start), [span.end for span in (one, other) if span.end is not None]
    return not ends or max(starts) < min(ends)


def text_of(span: SpanRef, messages: Sequence[Message]) -> str:
    """Return the characters of a span; of a whole tool call its name, a line end, and its arguments.

    Raises:
        SpanError: see `check_span`.
    """
    check_span(span, messages)
    message = messages[span.message]
    if span.part == "content":
        return message.content[span.start : span.end]
    call = message.tool_calls[span.call]
    if span.start == 0 and span.end is None:
        return f"{call.name}\n{call.arguments}"
    return call.arguments[span.start : span.end]


def subtract(interval: Interval, covered: Iterable[Interval]) -> list[Interval]:
    """Return what of `interval` is in none of `covered`, in order; empty pieces are left out."""
    start, end = interval
    pieces = []
    for low, high in sorted(covered):
        if high <= start or low >= end or low >= high:
            continue
        if low > start:
            pieces.append((start, low))
        start = max(start, high)
    if start < end:
        pieces.append((start, end))
    return pieces


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the intervals sorted, those that overlap joined, empty ones left out."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def free_parts(interval: Interval, taken: Sequence[Interval]) -> list[Interval]:
    """Return the parts of `interval` that are in none of `taken` (sorted, apart), in order.

    Neighboring spans of characters may share one token that straddles their border. It belongs to the span that was
    there first.
    """
    first = max(0, bisect_left(taken, interval) - 1)
    last = bisect_left(taken, (interval[1], interval[1]), lo=first)
    return subtract(interval, taken[first:last])


def clip(interval: Interval, taken: Sequence[Interval]) -> Interval:
    """Return the first of the `free_parts`; (start, start) if there is none."""
    free = free_parts(interval, taken)
    return free[0] if free else (interval[0], interval[0])
