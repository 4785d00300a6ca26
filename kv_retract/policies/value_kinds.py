"""Kinds of values that replace one another in what people say: an aisle seat a window seat, 4 pm 3 pm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ..ledger.sentences import stem

_KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "seat": (r"window|aisle|middle", "seat seating"),
    "day": (
        r"(?:mon|tues|wednes|thurs|fri|satur|sun)days?|today|tonight|tomorrow|weekend"
        r"|\d{1,2}(?:st|nd|rd|th)?(?: of)? (?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
        r"|(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]* \d{1,2}(?:st|nd|rd|th)?\b"
        r"|\d{1,2}(?:st|nd|rd|th)|\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}(?:[./]\d{2,4})?",
        "day date",
    ),
    "time": (
        r"\d{1,2}(?:[:.]\d\d)? ?(?:am|pm|a\.m\.|p\.m\.|o['’]clock)|\d{1,2}:\d\d"
        r"|noon|midnight|morning|afternoon|evening",
        "time hour",
    ),
    "money": (
        r"[$€£] ?\d[\d,.]{0,12}|\d[\d,.]{0,12} ?(?:dollars?|euros?|pounds?|usd|eur|gbp|bucks)",
        "budget price limit cost amount",
    ),
    "cabin": (r"(?:premium )?economy|business(?: class)?|first class|second class", "cabin class"),
    "diet": (r"vegetarian|vegan|halal|kosher|gluten.free|pescatarian|low.carb|lactose.free", "diet dietary meal"),
    "colour": (
        r"red|blue|green|yellow|black|white|gr[ae]y|brown|orange|purple|pink|silver|golden",
        "colour color",
    ),
    "size": (r"small|medium|large|x+l", "size"),
    "language": (
        r"english|german|french|spanish|italian|portuguese|dutch|polish|russian|arabic|hindi|chinese|japanese|korean",
        "language",
    ),
    "email": (r"[\w.+-]{1,64}@[\w-]{1,64}(?:\.\w{2,24}){1,4}", "email mail"),
    "number": (r"one|two|three|four|five|six|seven|eight|nine|ten|\d+", "number"),
}  # fmt: skip
KIND_NOUNS: Final[Mapping[str, str]] = {
    stem(noun): kind for kind, (_, nouns) in _KINDS.items() for noun in nouns.split()
}
"""Stem of a noun to the kind that it names: "date" stands for "12 May"."""
_VALUE = re.compile(
    "|".join(rf"(?P<{kind}>(?<![\w$€£])(?:{values})(?!\w))" for kind, (values, _) in _KINDS.items()), re.IGNORECASE
)


def value_kinds(text: str) -> dict[str, frozenset[str]]:
    """Return the kinds of the values in a text, each with its values in lower case; what fits several is the first."""
    found: dict[str, set[str]] = {}
    for match in _VALUE.finditer(text):
        found.setdefault(str(match.lastgroup), set()).add(match[0].lower())
    return {kind: frozenset(values) for kind, values in found.items()}
