"""Text to token ids with character offsets; special tokens come from the template only, never from a message."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Interval

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Encoding:
    """Token ids of a text and where each token stands in it.

    The character intervals of the tokens cover the text without gaps and ascend; tokens that share one character (bytes
    of it) have the same interval.
    """

    ids: IntArray
    """Shape: (num_tokens,)"""
    starts: IntArray
    """First character of each token. Shape: (num_tokens,)"""
    ends: IntArray
    """One past its last character. Shape: (num_tokens,)"""

    def interval(self, start: int, end: int) -> Interval:
        """Return the tokens that hold any character of `[start, end)`."""
        return int(np.searchsorted(self.ends, start, side="right")), int(np.searchsorted(self.starts, end, side="left"))


class Guard:
    """Keeps strings that look like special tokens from becoming special tokens.

    Before a template is rendered, each such string inside of a message is replaced by a placeholder that no message
    contains; after it, `split` puts the strings back as pieces of their own, to be encoded as plain text.

    Args:
        specials: the special-token strings of a tokenizer.
        nonce: letters and digits that no message contains.
    """

    def __init__(self, specials: Sequence[str], nonce: str) -> None:
        self._pattern = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self._nonce = nonce
        self._numbers: dict[str, int] = {}
        self._placeholder = re.compile(f"H{nonce}x([0-9]+)h")

    def hide(self, value: Any) -> Any:
        """Replace them in a text, or in every text of a JSON-like value (keys too)."""
        if isinstance(value, str):
            return self._pattern.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {self.hide(k): self.hide(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(v) for v in value]
        return value

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Cut a rendered text into pieces `(text, hostile)`; joined, they are the text as it should be read."""
        found = list(self._numbers)
        parts = self._placeholder.split(rendered)
        pieces = [(found[int(part)], True) if i % 2 else (part, False) for i, part in enumerate(parts)]
        return [piece for piece in pieces if piece[0]]

    def join(self, rendered: str) -> str:
        """Put the strings back and return the text as it should be read."""
        return "".join(piece for piece, _ in self.split(rendered))

    def _replace(self, match: re.Match[str]) -> str:
        number = self._numbers.setdefault(match.group(), len(self._numbers))
        return f"H{self._nonce}x{number}h"


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return every string that the tokenizer reads as a special token, and its id."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {**added, **named}


def encode(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> Encoding:
    """Tokenise pieces one by one and join them; without hostile pieces this is the tokenizer's own result."""
    ids, starts, ends = [], [], []
    at = 0
    for text, hostile in pieces:
        output = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=hostile, verbose=False
        )
        offsets = np.array(output["offset_mapping"], dtype=np.int64).reshape(-1, 2) + at
        if len(offsets) and offsets[0, 1] == at:  # a space that begins a text is reported as empty by some
            offsets[0, 1] = offsets[1, 0] if len(offsets) > 1 else at + len(text)
        ids.append(np.array(output["input_ids"], dtype=np.int64))
        starts.append(offsets[:, 0])
        ends.append(offsets[:, 1])
        at += len(text)
    joined = [np.concatenate(parts) if parts else np.empty(0, np.int64) for parts in (ids, starts, ends)]
    return Encoding(joined[0], *_cover(joined[1], joined[2], at))


def _cover(starts: IntArray, ends: IntArray, length: int) -> tuple[IntArray, IntArray]:
    """Close the gaps that tokenizers leave in their offsets.

    Some report white space as if it were in no token; it belongs to the token behind it, or to the token of white space
    that is reported as empty.
    """
    if not len(ends):
        return starts, ends
    ends = np.maximum.accumulate(ends)
    before = np.concatenate([[0], ends[:-1]])
    starts = np.minimum(starts, before)
    starts = np.where(starts >= ends, -1, starts)  # still empty: a further byte of the character before
    starts = np.maximum.accumulate(starts)
    ends[-1] = length
    return starts, ends
