"""Where the items of a long JSON list begin: cheap borders to cut it at."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..ledger.json_text import value_end

_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*,\s*")
_COLON = re.compile(r"\s*:\s*")


def item_starts(text: str) -> list[int]:
    """Return where the items of the list begin that is the text, or the longest value of the object that is the text.

    Empty where there is no such list. Each value is read once by the standard library's decoder, and once more in the
    longest list.
    """
    at = _after(_SPACE, text, 0)
    if text.startswith("{", at):
        spans = list(_members(text, at))
        at = max(spans, key=lambda span: span[1] - span[0])[0] if spans else at
    return [start for start, _ in _values(text, at + 1)] if text.startswith("[", at) else []


def _values(text: str, at: int) -> Iterator[tuple[int, int]]:
    """Yield the characters of the values that begin at `at`, up to the first that is malformed."""
    at = _after(_SPACE, text, at)
    while (end := value_end(text, at)) is not None:
        yield at, end
        at = _after(_SEPARATOR, text, end)


def _members(text: str, at: int) -> Iterator[tuple[int, int]]:
    """Yield the characters of the values of the object that begins at `at`, likewise."""
    at = _after(_SPACE, text, at + 1)
    while (key_end := value_end(text, at)) is not None:
        at = _after(_COLON, text, key_end)
        end = value_end(text, at)
        if end is None:
            return
        yield at, end
        at = _after(_SEPARATOR, text, end)


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
