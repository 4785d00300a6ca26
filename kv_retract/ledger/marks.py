"""Marks that are rendered along with the messages and tell where the template put their texts.

A mark consists of letters and digits, so it survives trimming and the escapes of JSON; it contains a hash of all that
is rendered, so no message can contain it. Marked text is never tokenised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..types import Interval

MarkKey = tuple[str, int, int]
"""(kind, message, number): which piece of which message."""

# White space that templates trim like any other, in place of a content's own: what is left of it can be told from the
# white space that the template writes itself.
_HEAD, _TAIL = "\x1c", "\x1d"


@dataclass(frozen=True, slots=True)
class Found:
    """Where a marked text stands in the rendering."""

    start: int
    end: int
    """Half-open interval of characters, surrounding white space left out."""
    head: str = ""
    tail: str = ""
    """What the template left of the white space around it, as rendered."""


@dataclass
class Marks:
    """Wraps texts in marks and reads them from the rendered text.

    Args:
        nonce: letters and digits that no message contains.
    """

    nonce: str
    _edges: dict[MarkKey, tuple[str, str]] = field(default_factory=dict)

    def wrap(self, text: str, key: MarkKey, head: str = "", tail: str = "") -> str:
        """Put marks around a text, and stand-ins for the white space around it outside of the marks."""
        self._edges[key] = head, tail
        return f"{_HEAD * len(head)}{self._mark(key, 'a')}{text}{self._mark(key, 'b')}{_TAIL * len(tail)}"

    def read(self, marked: str) -> tuple[str, dict[MarkKey, list[Found]]]:
        """Take the marks out.

        Returns:
            The text as it would be without marks, and every place of each key. A key whose marks came through
            incomplete or in another order has an empty list; a key that was not rendered is missing.
        """
        text: list[str] = []
        sides: dict[MarkKey, dict[str, list[tuple[int, str]]]] = {}
        at = length = 0
        for match in self._pattern().finditer(marked):
            kind, message, number, side = match.groups()
            key = (kind, int(message), int(number))
            head, tail = self._edges.get(key, ("", ""))
            start, end, restored = match.start(), match.end(), ""
            if side == "a":
                start, restored = _before(marked, start, head)
            elif side == "b":
                end, restored = _behind(marked, end, tail)
            text += (marked[at:start], restored)
            length += start - at + len(restored)
            where = length - len(restored) if side == "b" else length
            sides.setdefault(key, {}).setdefault(side, []).append((where, restored))
            at = end
        text.append(marked[at:])
        return "".join(text), {key: _pair(found) for key, found in sides.items()}

    def _mark(self, key: MarkKey, side: str) -> str:
        kind, message, number = key
        return f"M{self.nonce}{kind}{message}x{number}{side}m"

    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"M{self.nonce}([a-z]+)([0-9]+)x([0-9]+)([ab])m")


def escaped(text: str, *, ascii_only: bool = False) -> str:
    """Return a text as JSON writes it, without the quotes."""
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def bounds(text: str) -> Interval:
    """Return the interval of a text without the white space around it."""
    return len(text) - len(text.lstrip()), len(text.rstrip())


def _before(marked: str, at: int, head: str) -> tuple[int, str]:
    """Return where the stand-ins that end at `at` begin, and what they stand for."""
    for stand_in, original in ((_HEAD, head), (escaped(_HEAD), escaped(head))):
        start = at - len(stand_in) * len(head)
        if head and start >= 0 and marked[start:at] == stand_in * len(head):
            return start, original
    return at, ""


def _behind(marked: str, at: int, tail: str) -> tuple[int, str]:
    """Return where the stand-ins that begin at `at` end, and what they stand for."""
    for stand_in, original in ((_TAIL, tail), (escaped(_TAIL), escaped(tail))):
        end = at + len(stand_in) * len(tail)
        if tail and marked[at:end] == stand_in * len(tail):
            return end, original
    return at, ""


def _pair(sides: dict[str, list[tuple[int, str]]]) -> list[Found]:
    opened: Sequence[tuple[int, str]] = sides.get("a", ())
    closed: Sequence[tuple[int, str]] = sides.get("b", ())
    if len(opened) != len(closed):
        return []
    pairs = [Found(a, b, head, tail) for (a, head), (b, tail) in zip(opened, closed, strict=True)]
    edges = [at for pair in pairs for at in (pair.start, pair.end)]
    return pairs if edges == sorted(edges) else []
