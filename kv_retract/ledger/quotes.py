"""Runs of words: what shows that a text repeats another. Runs do not go over the strings of JSON."""

from __future__ import annotations

import re
from typing import NamedTuple, TypeAlias

from .views import BREAK, FILLER

Words: TypeAlias = tuple[str, ...]
_WORD = re.compile(r"[^\W_]+")


class Run(NamedTuple):
    """Words of a view that follow each other, and where they stand."""

    words: Words
    """Without case."""
    start: int
    end: int


def words_and_runs(text: str, length: int) -> set[str | Words]:
    """Return every word of a view, and every run of `length` words, without their places: quick."""
    found: set[str | Words] = set()
    for piece in text.replace(FILLER, "").casefold().split(BREAK):
        words = _WORD.findall(piece)
        found.update(words)
        if len(words) >= length:
            found.update(zip(*(words[first:] for first in range(length)), strict=False))
    return found


def runs(text: str, length: int) -> list[Run]:
    """Return every run of `length` words of a view with its place, in order."""
    found = []
    at = 0
    for piece in text.split(BREAK):
        matches = _WORD.finditer(piece) if len(piece) >= 2 * length - 1 else ()
        words = [(word, *m.span()) for m in matches if (word := m[0].replace(FILLER, "").casefold())]
        for first in range(len(words) - length + 1):
            own = words[first : first + length]
            found.append(Run(tuple(word for word, _, _ in own), at + own[0][1], at + own[-1][2]))
        at += len(piece) + 1
    return found
