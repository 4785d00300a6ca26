"""Values that tell where a text comes from: identifiers, numbers, dates, codes, addresses, names. Without a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from .views import BREAK, FILLER


class Value(NamedTuple):
    """A value of a view, and where it stands."""

    key: str
    """Equal for equal values, however they are written."""
    start: int
    end: int


_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)(?![A-Za-z])\.?"
)
_DAY = r"(?:[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?(?![A-Za-z0-9])"
_YEAR = r"(?:,? \d{4}(?!\d))?"
_VALUE = re.compile(
    # Only where a token begins: looking again at the parts of a long one would be quadratic.
    r"(?=[A-Za-z0-9])(?<![A-Za-z0-9])(?<![A-Za-z0-9][._@/+-])(?<![A-Za-z0-9][._/-]{2})(?:"
    r"\d{4}-(?P<month>0[1-9]|1[0-2])-(?P<day>0[1-9]|[12]\d|3[01])(?!\d)"
    rf"|(?P<month_name>{_MONTH}) (?P<its_day>{_DAY}){_YEAR}"
    rf"|(?<!:)(?P<the_day>{_DAY}) (?:of )?(?P<its_month>{_MONTH}){_YEAR}"
    r"|(?P<grouped>\d{1,3}(?:,\d{3})++(?:\.\d++)?)(?![A-Za-z0-9]|[.,]\d)"
    r"|(?P<capitals>[A-Z]{5,}+)(?![A-Za-z0-9]|[._@/+-]{1,2}[A-Za-z0-9])"
    # Words of letters are most of a text, and no values.
    r"|(?![A-Za-z]++(?![0-9]|[._@/+-]{1,2}[A-Za-z0-9]|://))"
    r"(?P<token>[A-Za-z0-9]++(?:(?:://|[._/-]{1,2}|[@+])[A-Za-z0-9]++)*+)"
    r")"
)
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)[a-z]{0,3}")
"""Also with its unit, as in 20kg."""
_COUNTED = re.compile(r"[A-Za-z]+[._-]?\d")
"""step1, item_2: the number of something, not its name."""
_SHORTEST_JOINED_NUMBERS = 7
"""Shorter ones are ranges, versions and fractions, as 10-12, 1.2.3 and 24/7."""
_SHORTEST_FILE = 8
"""Shorter ones are abbreviations, as e.g, and what lacks a space."""

_CAPITALISED = re.compile(r"(?<![^\W_])[^\W\d_a-z][^\W\d_]++(?![^\W_])")
_CALENDAR: Final = frozenset(
    """january february march april may june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday""".split()
)
_SHORTEST_NAME = 3
_SOMETHING = re.compile(r"[^\W_]")


def values(text: str, *, min_characters: int, min_digits: int) -> Iterator[Value]:
    """Yield the values of a view in order: dates, numbers, identifiers, codes, addresses of mail, files and pages.

    A date's key is its month and day, as people leave out the year. A number's key has no separators, sign, unit, or
    zeros behind the point. Case does not count, nor `#` or a currency in front. No values: small and round numbers,
    times of the day, the numbers of things (step1), and words, also those that are joined (round_trip).

    Args:
        text: a view.
        min_characters: of an identifier.
        min_digits: of a number, without the zeros at its ends.
    """
    for match in _VALUE.finditer(text):
        key = _key(match, min_characters, min_digits)
        if key:
            yield Value(key, *match.span())


def capitalised(text: str) -> list[Value]:
    """Return the capitalised words of a view in order: each may be a part of a name. Months and weekdays are none."""
    found = [
        Value(match[0].replace(FILLER, "").casefold(), *match.span())
        for match in _CAPITALISED.finditer(text)
        if match[0][0].isupper() and not match[0].isupper()
    ]
    return [word for word in found if word.key not in _CALENDAR]


def names(text: str, words: Sequence[Value]) -> list[Value]:
    """Return which of some capitalised words of a view are names: neighbours, strings of JSON, words inside a sentence.

    Sentences and headings begin with a capital too.
    """
    runs: list[list[Value]] = []
    for word in words:
        gap = text[runs[-1][-1].end : word.start] if runs else ""
        if gap == " " or (BREAK in gap and not _SOMETHING.search(gap)):
            runs[-1].append(word)
        else:
            runs.append([word])
    return [word for run in runs for word in run if len(run) > 1 or _names_alone(text, word)]


def _names_alone(text: str, word: Value) -> bool:
    if len(word.key) < _SHORTEST_NAME or word.start == 0:
        return False
    if text[word.start - 1] == BREAK:
        return text[word.end : word.end + 1] == BREAK
    return text[word.start - 1] == " " and text[max(0, word.start - 2)].islower()


def _key(match: re.Match[str], min_characters: int, min_digits: int) -> str:
    kind = match.lastgroup
    if kind == "token":
        return _token_key(match["token"], min_characters, min_digits)
    if kind == "capitals":
        return match["capitals"].casefold()
    if kind == "grouped":
        return _number_key(match["grouped"].replace(",", ""), min_digits)
    if kind == "day":
        return _date_key(int(match["month"]), match["day"])
    name, day = (match["month_name"], match["its_day"]) if match["its_day"] else (match["its_month"], match["the_day"])
    return _date_key(_MONTHS.index(name[:3].lower()) + 1, day)


def _token_key(token: str, min_characters: int, min_digits: int) -> str:
    number = _NUMBER.fullmatch(token)
    if number:
        # A zero in front is part of an identifier.
        identifier = token[0] == "0" and token.isdigit() and len(token) >= min_characters
        return token if identifier else _number_key(number[1], min_digits)
    if token.isalpha() or len(token) < min_characters or _COUNTED.fullmatch(token):
        return ""
    has_letters = any(map(str.isalpha, token))
    if not has_letters:
        return token if len(token) >= _SHORTEST_JOINED_NUMBERS else ""
    if any(map(str.isdigit, token)) or "@" in token:
        return token.casefold()
    is_file = ("." in token or token.count("/") > 1) and len(token) >= _SHORTEST_FILE
    return token.casefold() if is_file else ""


def _number_key(number: str, min_digits: int) -> str:
    whole, _, fraction = number.partition(".")
    fraction = fraction.rstrip("0")
    plain = f"{whole.lstrip('0') or '0'}.{fraction}" if fraction else whole.lstrip("0")
    return plain if len(plain.replace(".", "").strip("0")) >= min_digits else ""


def _date_key(month: int, day: str) -> str:
    return f"{month:02}/{int(day.rstrip('stndrh')):02}"
