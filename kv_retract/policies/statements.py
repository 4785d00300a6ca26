"""What a user has said so far, found by what it is about."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import NamedTuple

from ..ledger.sentences import Sentence, clauses, content_stem, content_words, sentences, words
from .value_kinds import KIND_NOUNS, value_kinds

_ASSERTS = re.compile(
    r"\b(?:(?:my|our|the|your) [^,;:!?]+? (?:is|are|was|were|should|shall|must|will|has)\b"
    r"|(?:I|we)(?:['’](?:m|d|re|ve|ll))?(?: (?:am|are|was|would|have|always|never|usually|really|only|can|could|also"
    r"|do|will))*"
    r"(?:n['’]?t)? (?:prefer|like|love|hate|want|need|live|work|use|fly|take|eat|drink|travel|stay|sit|go|rather"
    r"|wish|own"
    r"|am|are|have|read|speak|study|learn|avoid|plan|arrive|leave|pay|meet|expect|should|a|an|on|in|at|from|not"
    r"|\w+ing|\w+ed"
    r"|\w+ic)\b"
    r"|it (?:is|should|must|has)\b|let['’]?s\b|(?:can|could|would|will) you\b)",
    re.IGNORECASE,
)
_REQUESTS = re.compile(
    r"^(?:and |also |then |so |ok(?:ay)?,? |for the \w+:? )*(?:please|kindly|book|reserve|order|get|choose|pick|add"
    r"|set|send"
    r"|use|make|put|schedule|call|write|ship|keep|find|buy|play|plan|switch|translate|include|sort|name|deliver"
    r"|cook|paint|always"
    r"|never|remember that|note that)\b",
    re.IGNORECASE,
)
_ASKS_FOR = re.compile(r"\b(?:can|could|would|will) (?:you|we|I)\b", re.IGNORECASE)
_MENTIONS = re.compile(r"\b(?:in mind\b|(?:not|never|don['’]?t) forget\b|again[.!]?$|later[.!]?$)", re.IGNORECASE)
_WEAK = 0.6
"""What a sentence that asserts and requests nothing counts: it may only mention the topic."""
_NEWEST = 16
"""How many statements with a word are looked at; so a look-up does not grow with the thread."""
_MOST_WORDS = 12
_NEAR_BEST = 0.8
"""Of the statements that score at least this share of the best, the newest is meant."""
_RECENT = 64
"""How many of the newest statements are searched for a value of a kind."""
_VALUE_SCORE = 0.8
LONGEST_SENTENCE = 400
"""Characters. People state and take back in short sentences; longer ones are pasted text and are not read."""


@dataclass(frozen=True)
class Statement:
    """One clause of a user message, or a whole sentence of it."""

    message: int
    range: Sentence
    text: str
    """Its characters."""
    stems: frozenset[str]

    @cached_property
    def asserts(self) -> bool:
        """Whether it states or requests something, rather than mentioning it or asking."""
        return asserts(self.text)

    @cached_property
    def kinds(self) -> dict[str, frozenset[str]]:
        """Values in it, by kind."""
        return value_kinds(self.text)


class Match(NamedTuple):
    """A statement that a cue may mean, and how well it fits, from 0 to 1."""

    statement: Statement
    score: float


def asserts(text: str) -> bool:
    """Whether a clause states or requests something: no mere mention, and no question but "can you book"."""
    if text.endswith("?") and not _ASKS_FOR.search(text):
        return False
    return bool(_ASSERTS.search(text) or _REQUESTS.search(text)) and not _MENTIONS.search(text)


class Statements:
    """Index of what a user said, in order. What is said later changes no earlier answer.

    Sentences are read when something is looked up, so that a thread in which nobody takes anything back costs little.
    """

    def __init__(self) -> None:
        self._unread: list[tuple[int, str, Sentence | None]] = []
        self._all: list[Statement] = []
        self._by_stem: dict[str, list[int]] = defaultdict(list)
        self._stems: dict[str, str] = {}

    def add(self, message: int, text: str, sentence: Sentence | None = None) -> None:
        """Keep a sentence of a user message; None: all of them."""
        self._unread.append((message, text, sentence))

    def about(self, topic: str) -> Match | None:
        """Return the newest of the statements that fit a noun phrase best; the last word of it counts twice.

        The score is the share of the topic's words that the statement has, weighted by their rarity in the thread. A
        word that names a kind of values ("date") is matched by a value of it. Questions are not meant.
        """
        self._read()
        topic_words = list(dict.fromkeys(content_words(topic)))[:_MOST_WORDS]
        weights = {word: self._rarity(word) * (2 if word == topic_words[-1] else 1) for word in topic_words}
        found = self._best(weights)
        return None if found and found.statement.text.endswith("?") and not found.statement.asserts else found

    def with_words(self, wrong: str) -> Match | None:
        """Return the newest statement or question that has all of the given words."""
        self._read()
        wrong_words = list(dict.fromkeys(content_words(wrong)))[:_MOST_WORDS]
        return self._best(dict.fromkeys(wrong_words, 1.0), at_least=1.0)

    def with_other_value(self, value: str) -> Match | None:
        """Return the newest statement with another value of a kind that `value` has."""
        self._read()
        kinds = value_kinds(value)
        if len(kinds) > 1:
            kinds.pop("number", None)  # "2 euros" is no number of something
        for statement in reversed(self._all[-_RECENT:]):
            same = kinds.keys() & statement.kinds.keys()
            if statement.asserts and any(not kinds[kind] & statement.kinds[kind] for kind in same):
                return Match(statement, _VALUE_SCORE)
        return None

    def wish(self, wish: str) -> Match | None:
        """Return the statement that a new wish replaces: another value of the same kind, or most words in common."""
        found = [match for match in (self.about(wish), self.with_other_value(wish)) if match]
        return max(found, key=lambda match: match.score, default=None)

    def _read(self) -> None:
        for message, text, sentence in self._unread:
            for part in sentences(text) if sentence is None else (sentence,):
                if part.end - part.start <= LONGEST_SENTENCE:
                    for clause in clauses(text, part):
                        self._keep(message, clause, clause.of(text))
        self._unread.clear()

    def _keep(self, message: int, range: Sentence, text: str) -> None:
        stems = set()
        for word in words(text):
            stem = self._stems.get(word)
            if stem is None:
                stem = self._stems[word] = content_stem(word)
            if stem and stem not in stems:
                stems.add(stem)
                self._by_stem[stem].append(len(self._all))
        self._all.append(Statement(message, range, text, frozenset(stems)))

    def _best(self, weights: dict[str, float], *, at_least: float = 0.0) -> Match | None:
        total = sum(weights.values())
        if not total:
            return None
        found: list[tuple[int, float]] = []
        for number in sorted({number for word in weights for number in self._places(word)}, reverse=True):
            statement = self._all[number]
            share = sum(weight for word, weight in weights.items() if _has(statement, word)) / total
            if share >= at_least:
                found.append((number, share * (1.0 if statement.asserts else _WEAK)))
        if not found:
            return None
        top = max(score for _, score in found)
        return next(Match(self._all[n], score) for n, score in found if score >= _NEAR_BEST * top)

    def _places(self, word: str) -> list[int]:
        places = self._by_stem.get(word, [])[-_NEWEST:]
        if word in KIND_NOUNS:
            first = max(0, len(self._all) - _RECENT)
            kind = KIND_NOUNS[word]
            places = places + [n for n in range(first, len(self._all)) if kind in self._all[n].kinds]
        return places

    def _rarity(self, word: str) -> float:
        return log(1 + (len(self._all) + 1) / (1 + len(self._by_stem.get(word, ()))))


def _has(statement: Statement, word: str) -> bool:
    return word in statement.stems or (word in KIND_NOUNS and KIND_NOUNS[word] in statement.kinds)
