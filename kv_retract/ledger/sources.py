"""What retracted spans said, and what of it is said elsewhere too: the index that lineage looks things up in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..types import Cascade, Guarantee, Interval, Retraction, SpanRef
from .quotes import Words, runs, words_and_runs
from .values import Value, capitalised, names, values

_MOST_ROOTS = 4
"""A value that more roots hold is followed from the strongest of them: one suffices to take something back, two tell
that undoing one of them is not enough, and hostile texts cannot multiply the work."""


@dataclass(eq=False, slots=True)
class Source:
    """A span that is taken back, from which others may be derived."""

    span: SpanRef
    root: Retraction
    """The proposal that the cascade began with."""
    hops: int
    """From the root; 0 is the root."""


class Clue(NamedTuple):
    """Two places that hold the same."""

    start: int
    """Where it stands in what may be derived."""
    end: int
    kind: Literal["value", "words", "attention"]
    weight: float
    source: Source
    at: Interval
    """Where it stands in the part of the source's span."""


class _Seen(NamedTuple):
    source: Source
    start: int
    end: int


class Sources:
    """Keys of what is taken back, and of what stands, as far as a thread was read. Reads views, from first to last.

    Args:
        min_characters: see `values`.
        min_digits: see `values`.
        min_words: length of a run of words.
    """

    def __init__(self, *, min_characters: int, min_digits: int, min_words: int) -> None:
        self._min_characters, self._min_digits, self._min_words = min_characters, min_digits, min_words
        self._seen: dict[str | Words, list[_Seen]] = {}
        self._seen_runs: set[Words] = set()
        self._standing: set[str | Words] = set()

    def add(self, sources: Sequence[Source], text: str, within: Interval) -> None:
        """Note what spans say: values, capitalised words, runs of words.

        Args:
            sources: whose span it is; several where a result has several roots.
            text: view of the whole part in which it stands.
            within: its characters.
        """
        start = max(0, within[0])
        piece = text[start : within[1]]
        repeated = runs(piece, self._min_words)
        self._seen_runs.update(run.words for run in repeated)
        found: list[tuple[str | Words, int, int]] = [*self.values(piece), *capitalised(piece), *repeated]
        strongest = sorted(sources, key=_weakness)[:_MOST_ROOTS]
        for key, low, high in found:
            for source in strongest:
                self._see(key, _Seen(source, start + low, start + high))

    def add_new(self, sources: Sequence[Source], found: Iterable[Value]) -> None:
        """Note the values of what was derived that came up nowhere before; its words are the model's own."""
        strongest = sorted(sources, key=_weakness)[:_MOST_ROOTS]
        for key, start, end in found:
            if strongest and key not in self._seen:
                self._seen[key] = [_Seen(source, start, end) for source in strongest]

    def stand(self, text: str, *, answer: bool) -> None:
        """Note what a view says that is not taken back: it is rare no more.

        Args:
            text: the view; what is taken back is blank.
            answer: the model wrote it, so what it has from a source does not count.
        """
        said = words_and_runs(text, self._min_words)
        said.update(value.key for value in self.values(text))
        self._standing |= said - self._seen.keys() if answer else said

    def stand_values(self, found: Iterable[Value]) -> None:
        """As `stand`, for values only."""
        self._standing.update(value.key for value in found)

    def values(self, text: str) -> Iterator[Value]:
        """Return the values of a view."""
        return values(text, min_characters=self._min_characters, min_digits=self._min_digits)

    def value_clues(self, found: Iterable[Value]) -> Iterator[Clue]:
        """Yield which values a source holds, and nothing else that was read."""
        for key, start, end in found:
            for seen in self._rare(key):
                yield Clue(start, end, "value", end - start, seen.source, (seen.start, seen.end))

    def name_clues(self, text: str) -> Iterator[Clue]:
        """Yield the names of a view that only a source holds."""
        rare = [word for word in capitalised(text) if self._rare(word.key)]
        return self.value_clues(names(text, rare))

    def word_clues(self, text: str) -> list[Clue]:
        """Return the runs of words of a view that only a source holds, those that go on joined."""
        if not self._seen_runs or self._seen_runs.isdisjoint(words_and_runs(text, self._min_words)):
            return []
        joined: list[Clue] = []
        open_: dict[Source, Clue] = {}
        for words, start, end in runs(text, self._min_words):
            going: dict[Source, Clue] = {}
            for seen in self._rare(words):
                clue = Clue(start, end, "words", self._min_words, seen.source, (seen.start, seen.end))
                before = open_.pop(seen.source, None)
                if before is not None:
                    at = (min(before.at[0], seen.start), max(before.at[1], seen.end))
                    clue = clue._replace(start=before.start, weight=before.weight + 1, at=at)
                going[seen.source] = clue
            joined += open_.values()
            open_ = going
        return [*joined, *open_.values()]

    def _rare(self, key: str | Words) -> Sequence[_Seen]:
        return () if key in self._standing else self._seen.get(key, ())

    def _see(self, key: str | Words, seen: _Seen) -> None:
        known = self._seen.setdefault(key, [])
        if any(other.source.root is seen.source.root for other in known):
            return
        known.append(seen)
        if len(known) > _MOST_ROOTS:
            known.sort(key=lambda one: _weakness(one.source))
            known.pop()


def _weakness(source: Source) -> tuple[bool, bool, int]:
    root = source.root
    return root.guarantee is not Guarantee.EXACT, root.cascade is not Cascade.LINEAGE, source.hops
