"""Names and values: pools too large to memorise what belongs to what, the same for the same random generator.

Words are built of syllables. One word or code in ten, told by a hash, belongs to the `test` split and never occurs in
training. Values are single syllables, the same of both splits: a small model says no token that was never an answer.
"""

from __future__ import annotations

import random
import zlib
from typing import Final, Literal, get_args

Split = Literal["train", "test"]
SPLITS: Final = get_args(Split)

_ONSETS = ("B", "Br", "D", "Dr", "F", "G", "Gr", "H", "J", "K", "Kl", "L", "M", "N", "P", "Qu", "R", "S", "T", "V", "Z")
_CODAS = ("l", "n", "r", "s")
FIRST: Final = tuple(o + v + c for o in _ONSETS for v in "aeiou" for c in _CODAS)
"""420 syllables that words begin with."""
_MIDDLES = ("a", "e", "i", "o", "u")
_ENDINGS = (
    "bar", "brin", "cott", "dal", "den", "dor", "fell", "gard", "gen", "holt", "kin", "land", "len", "lin", "lo", "mar",
    "mer", "mond", "na", "nik", "nor", "quist", "ra", "ren", "rik", "ro", "sen", "son", "stad", "ta", "tin", "ton",
    "vek", "ver", "vik", "wald", "ward", "wick", "win", "zen",
)  # fmt: skip
SIZE: Final = len(FIRST) * len(_ENDINGS) * (1 + len(_MIDDLES))
"""Number of words."""


class Names:
    """Draws words of one split, none of them twice.

    Args:
        rng: where chance comes from.
        split: `train` or `test`.
    """

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng, self._split = rng, split
        self._seen: set[str] = set()

    def word(self) -> str:
        """Return a new word: `Kelbrin`. Its first syllable is new as well, as long as there are some."""
        for attempt in range(10_000):
            first = self._rng.choice(FIRST)
            word = first + self._rng.choice(("", "", *_MIDDLES)) + self._rng.choice(_ENDINGS)
            if split_of(word) == self._split and word not in self._seen and (attempt > 100 or first not in self._seen):
                self._seen |= {first, word}
                return word
        raise RuntimeError("the pool of words is exhausted")

    def tag(self) -> str:
        """Return a new short value, of any split: one syllable, a single token of the bundled tokenizer."""
        for _ in range(10_000):
            tag = self._rng.choice(FIRST)
            if tag not in self._seen and tag != "For":  # with which sentences begin
                self._seen.add(tag)
                return tag
        raise RuntimeError("the pool of tags is exhausted")

    def code(self) -> str:
        """Return a new name of a thing: a syllable and a number of two digits, as in `Kel-42`."""
        for _ in range(10_000):
            code = f"{self._rng.choice(FIRST)}-{self._rng.randrange(10, 100)}"
            if split_of(code) == self._split and code not in self._seen:
                self._seen.add(code)
                return code
        raise RuntimeError("the pool of codes is exhausted")


def split_of(word: str) -> Split:
    """Return the split that a word belongs to."""
    return "test" if zlib.crc32(word.encode()) % 10 == 0 else "train"
