"""Which proposals overlap, and what names a proposal."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from ..spans import check_span
from ..types import Message, Retraction

_Part = tuple[int, str, int]


class Overlaps:
    """Proposals of one policy, found by what they overlap.

    Args:
        proposals: those to find.
        messages: what they lie in.

    Raises:
        SpanError: a proposal lies outside of the messages.
    """

    def __init__(self, proposals: Iterable[Retraction], messages: Sequence[Message]) -> None:
        self._messages = messages
        by_part: dict[_Part, list[tuple[int, int, int, Retraction]]] = {}
        for number, retraction in enumerate(proposals):
            start, end = _range(retraction, messages)
            by_part.setdefault(_part(retraction), []).append((start, end, number, retraction))
        self._by_part = {part: sorted(found, key=lambda one: one[:3]) for part, found in by_part.items()}
        self._starts = {part: [one[0] for one in found] for part, found in self._by_part.items()}
        # The furthest end so far tells where to stop looking to the left.
        self._ends = {part: list(accumulate((one[1] for one in found), max)) for part, found in self._by_part.items()}

    def of(self, retraction: Retraction) -> list[Retraction]:
        """Return the proposals that share a character with `retraction`, or an empty part with it."""
        part = _part(retraction)
        found = self._by_part.get(part, [])
        start, end = _range(retraction, self._messages)
        overlapping = []
        for number in range(bisect_left(self._starts.get(part, []), max(end, start + 1)) - 1, -1, -1):
            if self._ends[part][number] < start:
                break
            low, high, _, other = found[number]
            if max(low, start) < min(high, end) or (low, high) == (start, end):
                overlapping.append(other)
        return overlapping[::-1]


def proposal_id(retraction: Retraction, messages: Sequence[Message]) -> str:
    """Return what names a proposal: 16 hexadecimal digits of a digest of policy, message and range.

    The message counts by its content (`Message.digest`), not by its index: the id stays when older messages are
    pruned, and equal messages share it.

    Raises:
        SpanError: the proposal lies outside of the messages.
    """
    start, end = _range(retraction, messages)
    span = retraction.span
    # A whole call includes its name, which no range of its arguments does.
    named = span.part == "tool_call" and span.end is None
    value = [retraction.policy, messages[span.message].digest(), span.part, span.call, start, end, named]
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:16]


def _part(retraction: Retraction) -> _Part:
    return retraction.span.message, retraction.span.part, retraction.span.call


def _range(retraction: Retraction, messages: Sequence[Message]) -> tuple[int, int]:
    length = check_span(retraction.span, messages)
    return retraction.span.start, length if retraction.span.end is None else retraction.span.end
