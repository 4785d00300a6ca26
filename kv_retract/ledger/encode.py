"""Text to token ids with character offsets; special tokens come from the template only, never from a message."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..types import Interval

IntArray = NDArray[np.int64]
Row = NDArray[np.int32]

_ONE_AT_A_TIME = threading.Lock()
# Whether special tokens are split is a state of the tokenizer: another thread must not change it between two texts.


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
        pattern: finds the special-token strings of a tokenizer; see `pattern_of`.
        nonce: letters and digits that no message contains.
    """

    def __init__(self, pattern: re.Pattern[str], nonce: str) -> None:
        self._pattern, self._nonce = pattern, nonce
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """How many different strings it has hidden."""
        return len(self._numbers)

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
        if not self._numbers:
            return [(rendered, False)] if rendered else []
        found = list(self._numbers)
        parts = re.split(f"H{self._nonce}x([0-9]+)h", rendered)
        pieces = [(found[int(part)], True) if i % 2 else (part, False) for i, part in enumerate(parts)]
        return [piece for piece in pieces if piece[0]]

    def join(self, rendered: str) -> str:
        """Put the strings back and return the text as it should be read."""
        return "".join(piece for piece, _ in self.split(rendered))

    def _replace(self, match: re.Match[str]) -> str:
        number = self._numbers.setdefault(match.group(), len(self._numbers))
        return f"H{self._nonce}x{number}h"


def pattern_of(specials: Iterable[str]) -> re.Pattern[str]:
    """Return what finds special-token strings in a text, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return every string that the tokenizer reads as a special token, and its id."""
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {**added, **named}


def encode(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> Encoding:
    """Tokenise pieces one by one and join them; without hostile pieces this is the tokenizer's own result."""
    rows = [row for text, hostile in pieces for row in encoded(tokenizer, [text], hostile)]
    return joined(rows, [len(text) for text, _ in pieces])


def encoded(tokenizer: Any, texts: Sequence[str], hostile: bool) -> list[Row]:
    """Tokenise texts, each by itself.

    Args:
        tokenizer: a fast transformers tokenizer.
        texts: any number of them.
        hostile: take nothing in them for a special token.

    Returns:
        Ids, first characters and ends of the tokens of each. Shape of each: (3, num_tokens)
    """
    if not texts:
        return []
    with _ONE_AT_A_TIME:
        output = tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=hostile,
            verbose=False,
        )  # fmt: skip
    rows = []
    for text, ids, offsets in zip(texts, output["input_ids"], output["offset_mapping"], strict=True):
        row = np.empty((3, len(ids)), np.int32)
        row[0] = ids
        row[1:] = np.array(offsets, dtype=np.int32).reshape(-1, 2).T
        if len(ids) and row[2, 0] == 0:  # a space that begins a text is reported as empty by some
            row[2, 0] = row[1, 1] if len(ids) > 1 else len(text)
        rows.append(row)
    return rows


def joined(rows: Sequence[Row], lengths: Sequence[int]) -> Encoding:
    """Put texts behind each other.

    Args:
        rows: what `encoded` returns of each.
        lengths: characters of each.
    """
    if not rows:
        return Encoding(*(np.empty(0, np.int64) for _ in range(3)))
    ids, starts, ends = np.concatenate(rows, axis=1, dtype=np.int64)
    ahead = np.repeat(np.cumsum([0, *lengths[:-1]]), [row.shape[1] for row in rows])
    return Encoding(ids, *_cover(starts + ahead, ends + ahead, sum(lengths)))


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
