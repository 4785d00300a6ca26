"""JSON as text: where its parts stand, so that what a model wrote is kept to the letter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def value_end(text: str, at: int) -> int | None:
    """Return where the JSON value that begins at `at` ends; None where there is none."""
    try:
        return _DECODER.raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return None


def members(text: str, at: int) -> tuple[dict[str, str], int] | None:
    """Return the members of the JSON object that begins at `at`, values as written, and where the object ends.

    None where there is no well-formed object.
    """
    end = value_end(text, at) if text.startswith("{", at) else None
    if end is None:
        return None
    found: dict[str, str] = {}
    at = _after_space(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        at = _after_space(text, _after_space(text, at) + 1)  # the colon
        stop = value_end(text, at)
        assert stop is not None, "the whole object was read before"
        found[key] = text[at:stop]
        at = _after_space(text, stop)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return found, end


def significant(text: str) -> Iterator[int]:
    """Yield the indices of the characters that are not white space between JSON tokens."""
    quoted = escaped = False
    for i, ch in enumerate(text):
        if quoted or not ch.isspace():
            yield i
        if ch == '"' and not escaped:
            quoted = not quoted
        escaped = ch == "\\" and not escaped


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None, "the pattern matches the empty string"
    return match.end()
