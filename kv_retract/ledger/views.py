"""Texts as they are meant, for comparison. A view is as long as its text: places in it are places in the text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from ..spans import union
from ..types import Interval

BREAK: Final = "\x01"
"""Stands for the quotes around a string of JSON, and for what is left out: nothing is read over it."""
FILLER: Final = "\u3164"
"""Keeps the length behind a letter that was an escape. It counts as a letter; who reads a word leaves it out."""

_LITERAL = re.compile(
    # A string that does not end goes on to the end, so that no part of it is walked over twice.
    r"(?:\"(?:[^\"\\]++|\\.?+)*+(?:\"|\Z)|'(?:[^'\\]++|\\.?+)*+(?:'|\Z))(?P<colon>\s*+:)?+|,",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_SPACES: Final = {"n": "\n", "r": "\r", "t": "\t", "b": " ", "f": " "}


def view(text: str) -> str:
    """Return the view of a text: of JSON (and Python literals) without the names of members, with escapes resolved."""
    begin, end = text.lstrip()[:1], text.rstrip()[-1:]
    if begin in ("{", "[") or (begin == end == '"'):
        return _LITERAL.sub(_shown, text)
    return text


def blank(text: str, gone: Iterable[Interval]) -> str:
    """Return a view without what stands in some intervals."""
    pieces, at = [], 0
    for start, end in union((max(0, start), end) for start, end in gone):
        pieces += [text[at:start], BREAK * (end - start)]
        at = end
    return "".join([*pieces, text[at:]])


def _shown(match: re.Match[str]) -> str:
    literal = match[0]
    if literal == "," or match["colon"] is not None:
        return " " * len(literal)
    closed = len(literal) > 1 and literal[-1] == literal[0]
    body = literal[1:-1] if closed else literal[1:]
    return BREAK + (_ESCAPE.sub(_resolved, body) if "\\" in body else body) + BREAK * closed


def _resolved(match: re.Match[str]) -> str:
    code, plain = match.groups()
    character = chr(int(code, 16)) if code else _SPACES.get(plain, plain)
    return character + (FILLER if character.isalpha() else " ") * (len(match[0]) - 1)
