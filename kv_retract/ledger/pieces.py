"""A content in pieces that a template may treat apart: reasoning between `<think>` tags, and the rest."""

from __future__ import annotations

import re

from ..types import Interval
from .marks import bounds

_TAG = re.compile("</?think>")


def pieces_of(content: str) -> list[Interval]:
    """Return the intervals of the pieces, in characters, without the white space around them.

    There are none where the content has no tags.
    """
    tags = [match.span() for match in _TAG.finditer(content)]
    found = []
    if tags:
        lows, highs = [0, *(end for _, end in tags)], [*(start for start, _ in tags), len(content)]
        for low, high in zip(lows, highs, strict=True):
            start, end = bounds(content[low:high])
            if start < end:
                found.append((low + start, low + end))
    return found
