"""Tokenising only what is new: a rendered text is cut before special tokens, and known pieces are not encoded again.

A tokenizer looks for its added tokens before anything else and then encodes what stands between them piece by piece, so
cutting there changes nothing. Every segment keeps the special token that it begins with: what follows it is then, as in
the whole text, not the beginning of a text, which some tokenizers treat apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .encode import Encoding, Row, encode, encoded, joined
from .recent import Recent

MOST_TOKENS = 1 << 20
"""Tokens that are kept; each segment counts as `_OVERHEAD` more."""
_OVERHEAD = 16

Segment = tuple[str, bool]
"""(text, hostile): hostile text is encoded without special tokens."""


class Encoder:
    """Encodes as `encode` does, its slow twin, and remembers segments. Safe to share between threads.

    Args:
        tokenizer: a fast transformers tokenizer.
        most: tokens to keep.
    """

    def __init__(self, tokenizer: Any, most: int = MOST_TOKENS) -> None:
        self._tokenizer = tokenizer
        self._recent: Recent[Segment, Row] = Recent(most)
        self._added, self._cuts = _added_tokens(tokenizer)
        if self._cuts and not self._agrees():
            self._cuts = frozenset()

    def encode(self, pieces: Sequence[Segment]) -> Encoding:
        """Tokenise pieces one by one and join them; what was cut is as if it had not been."""
        segments = [
            (part, hostile) for text, hostile in pieces for part in (self._cut(text) if not hostile else [text])
        ]
        found = self._recent.find(segments)
        missing = {segment for segment, known in zip(segments, found, strict=True) if known is None}
        fresh = dict(self._encoded(missing)) if missing else {}
        rows = [known if known is not None else fresh[s] for s, known in zip(segments, found, strict=True)]
        return joined(rows, [len(text) for text, _ in segments])

    def _cut(self, text: str) -> list[str]:
        if not self._cuts:
            return [text]
        starts = [m.start() for m in self._added.finditer(text) if m.start() and m.group() in self._cuts]
        return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]

    def _encoded(self, segments: Iterable[Segment]) -> Iterable[tuple[Segment, Row]]:
        made = []
        for hostile in (False, True):
            texts = [text for text, is_hostile in segments if is_hostile == hostile]
            rows = encoded(self._tokenizer, texts, hostile)
            made += [((text, hostile), row) for text, row in zip(texts, rows, strict=True)]
        self._recent.keep((segment, row, row.shape[1] + _OVERHEAD) for segment, row in made)
        return made

    def _agrees(self) -> bool:
        """Whether this tokenizer is like those the module speaks of: a few texts come out as they do whole."""
        for token in sorted(self._cuts)[:8]:
            for text in (f"{token}a b\n{token} c{token}{token}\n\n  é😀 {token}\n", f"a {token}", f" \n{token}A.\t"):
                whole, cut = encode(self._tokenizer, [(text, False)]), self.encode([(text, False)])
                if not all(
                    np.array_equal(a, b)
                    for a, b in ((whole.ids, cut.ids), (whole.starts, cut.starts), (whole.ends, cut.ends))
                ):
                    return False
        return True


def _added_tokens(tokenizer: Any) -> tuple[re.Pattern[str], frozenset[str]]:
    """Return what finds the added tokens as the tokenizer does, and those before which a text may be cut."""
    tokens = list(tokenizer.added_tokens_decoder.values())
    # The tokenizer takes, of those that match first, the longest; others match only once the rest is normalised.
    raw = sorted((t.content for t in tokens if not t.normalized and t.content), key=len, reverse=True)
    cuts = {
        t.content
        for t in tokens
        if t.special and not (t.normalized or t.lstrip or t.rstrip) and t.content and t.content == t.content.strip()
    }
    if any(t.single_word for t in tokens):  # whether it is one depends on the character behind it
        cuts.clear()
    return re.compile("|".join(map(re.escape, raw)) or r"(?!)"), frozenset(cuts)
