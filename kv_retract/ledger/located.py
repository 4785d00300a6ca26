"""A text of a message inside of the rendered text, and where each of its characters went."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import Interval
from .json_text import significant
from .marks import escaped


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of characters of the original and what the template made of it."""

    original: str
    start: int
    end: int
    """Half-open interval of characters of the rendered text."""

    def position(self, rendered: str, index: int) -> int | None:
        """Return where character `index` of the original begins in the rendered text; None where that is unclear.

        Known forms: verbatim; escaped as in a JSON string; JSON with other white space between its tokens; left out.
        """
        if index == 0 or self.start == self.end:
            return self.start
        if index == len(self.original):
            return self.end
        part = rendered[self.start : self.end]
        if part == self.original:
            return self.start + index
        for ascii_only in (False, True):
            if part == escaped(self.original, ascii_only=ascii_only):
                return self.start + len(escaped(self.original[:index], ascii_only=ascii_only))
        offset = _json_offset(part, self.original, index)
        return None if offset is None else self.start + offset


@dataclass(frozen=True, slots=True)
class Located:
    """Where a content, or a tool call from its name through its arguments, stands in the rendered text."""

    start: int
    end: int
    """Half-open interval of characters of the rendered text: the whole."""
    segments: tuple[Segment, ...] = ()
    """They make up the content or the arguments; none where ranges inside of it cannot be found."""

    def characters(self, rendered: str, start: int, end: int) -> Interval | None:
        """Return the rendered interval of `[start, end)` of the content or of the arguments; None where unclear."""
        low, high = self._position(rendered, start, first=False), self._position(rendered, end, first=True)
        return None if low is None or high is None else (low, high)

    def _position(self, rendered: str, index: int, *, first: bool) -> int | None:
        """Return a position; on the border of two segments, that of the `first` or of the second."""
        at = 0
        for number, segment in enumerate(self.segments):
            at += len(segment.original)
            if index < at or (index == at and (first or number == len(self.segments) - 1)):
                return segment.position(rendered, index - at + len(segment.original))
        return None


LEFT_OUT = Located(0, 0)
"""What the template certainly shows nothing of."""


def _json_offset(rendered: str, original: str, index: int) -> int | None:
    """Return the position of a character where two JSON texts differ only in white space between tokens."""
    ours, theirs = list(significant(original)), list(significant(rendered))
    if [original[i] for i in ours] != [rendered[i] for i in theirs]:
        return None
    # White space stands where the next significant character does.
    at = next((k for k, i in enumerate(ours) if i >= index), None)
    return len(rendered) if at is None else theirs[at]
