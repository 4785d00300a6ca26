"""Sentences, clauses and content words of a text, with their character ranges; English, without a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Sentence(NamedTuple):
    """A range of characters of a text, without white space at its edges."""

    start: int
    end: int

    def of(self, text: str) -> str:
        """Return its characters."""
        return text[self.start : self.end]


_ENDS = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|\n\s*")
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|prof|st|no|nr|vs|etc|approx|dept|e\.g|i\.e|a\.m|p\.m|u\.s|inc|ltd)|\b[A-Z])\.$",
    re.IGNORECASE,
)
# "a.m." and "etc." may end a sentence, the others do not: what follows decides.
_GOES_ON = re.compile(r"\s+[a-z0-9]")
_NEVER_LAST = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e)\.$", re.IGNORECASE)
_LONGEST_ABBREVIATION = 7

# A new subject or a request behind a conjunction begins a statement of its own: "I am vegan, and my wife eats meat".
_NEW_CLAUSE = re.compile(
    r"\s*;\s+|\s+[-–—]\s+"
    r"|,?\s+(?:and|but|also|plus|so|while)\s+(?=(?:(?:i|we)(?:['’]\w+)?|my|our|please|also|he|she|they)\b)",
    re.IGNORECASE,
)
_FEWEST_WORDS = 2

_WORD = re.compile(r"[^\W_]+(?:[.'’@:/-][^\W_]+)*")
STOP_WORDS = frozenset(
    """a about above after again all also am an and any anymore anything are as ask asked at back be because been before
    behind being but by can could dear did do does doing done earlier everything for from get had has have he hello her
    here hi him his how however i if in instead into is it its just kindly last let like longer make may maybe me mean
    meant mention mentioned might mind mine must my never need no nor not now of off ok okay on once only or other our
    ours out over part perhaps please preference prefer previous previously rather really regarding request requested
    said say should so some something sorry still such than thank thanks that the their them then there these they thing
    this those through time to told too up us very wait want wanted was we well were what when where whether which while
    who whole why will wish with would yes you your yours actually already always previous d ll m re s t ve don
    didn isn wasn won doesn couldn wouldn shouldn aren haven hasn""".split()
)
"""Words that say nothing about a topic; also what people say of statements, as in "what I said before"."""
_CONTRACTED = re.compile(r"(?:n['’]t|['’](?:s|d|m|ll|re|ve))$")


def sentences(text: str) -> Iterator[Sentence]:
    """Yield the sentences of a text in order; a line break ends one too. Linear in the text."""
    start = 0
    for match in _ENDS.finditer(text):
        if text[match.start()] == "." and not _is_end(text, match):
            continue
        yield from _trimmed(text, start, match.end())
        start = match.end()
    yield from _trimmed(text, start, len(text))


def clauses(text: str, sentence: Sentence) -> list[Sentence]:
    """Return the statements that a sentence coordinates, without the conjunctions; the sentence itself where it is one.

    Example:
        "I'd like the aisle, and I need a wheelchair." has two, the first without the comma, the second with the stop.
    """
    pieces: list[Sentence] = []
    start = sentence.start
    for match in _NEW_CLAUSE.finditer(text, sentence.start, sentence.end):
        if _has_words(text, start, match.start()) and _has_words(text, match.end(), sentence.end):
            pieces += _trimmed(text, start, match.start())
            start = match.end()
    return [*pieces, *_trimmed(text, start, sentence.end)]


def words(text: str) -> list[str]:
    """Return the words of a text in order, in lower case, numbers and addresses included."""
    return [match[0].lower() for match in _WORD.finditer(text)]


def content_words(text: str) -> list[str]:
    """Return the stems of the words that say what a text is about, in order, repetitions included."""
    return [found for word in words(text) if (found := content_stem(word))]


def content_stem(word: str) -> str:
    """Return the stem of one of `words`; empty where the word says nothing about a topic."""
    bare = _CONTRACTED.sub("", word)
    return "" if not bare or word in STOP_WORDS or bare in STOP_WORDS else stem(bare)


def stem(word: str) -> str:
    """Return a word without its plural and verb endings, roughly: "hotels" and "hotel", "booked" and "booking"."""
    if len(word) < 4 or not word.isalpha():
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-2] if word.endswith(("ches", "shes", "xes", "sses")) else word[:-1]
    for ending in ("ing", "ed"):
        root = word.removesuffix(ending)
        if root != word and len(root) >= 3 and re.search(r"[aeiouy]", root):
            return root[:-1] if len(root) > 3 and root[-1] == root[-2] and root[-1] not in "ls" else root
    return word.removesuffix("e") if len(word) > 3 else word


def _is_end(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - _LONGEST_ABBREVIATION) : match.start() + 1]
    if _NEVER_LAST.search(before):
        return match.end() == len(text)
    return not (_ABBREVIATION.search(before) and _GOES_ON.match(text, match.end()))


def _trimmed(text: str, start: int, end: int) -> Iterator[Sentence]:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    if start < end:
        yield Sentence(start, end)


def _has_words(text: str, start: int, end: int) -> bool:
    found = _WORD.finditer(text, start, end)
    return all(next(found, None) is not None for _ in range(_FEWEST_WORDS))
