"""Detectors: from one text to the ranges of characters that should not be in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ..errors import PolicyError


class Found(NamedTuple):
    """One find of a detector: characters `[start, end)` of the text it was given."""

    start: int
    end: int
    confidence: float
    """0 to 1."""
    label: str
    """What it is, in a few words of the detector's own: it becomes part of a reason and must not quote the text."""


class Detector(Protocol):
    """Contract: any callable from a text to what it finds there.

    It is asked before every step, for texts it has seen again once they are forgotten: the answer must depend on the
    text only, and should take time that is linear in it. Finds may overlap and come in any order; the caller owns the
    list.
    """

    def __call__(self, text: str, /) -> Sequence[Found]:
        """Return what is found in `text`; empty where there is nothing."""
        ...


@dataclass(kw_only=True)
class PatternDetector:
    """Find what regular expressions match; of an expression with groups, the first group that took part."""

    patterns: Mapping[str, str]
    """Label to regular expression, as in `{"customer number": r"\\bC-\\d{6}\\b"}`."""
    confidence: float = 1.0
    """Of every find."""
    ignore_case: bool = False

    def __post_init__(self) -> None:
        """Compile once; raises PolicyError where an expression is malformed or there is none."""
        if not self.patterns:
            raise PolicyError("expected at least one pattern, got none; give label and regular expression")
        check_share("confidence", self.confidence)
        for pattern in self.patterns.values():
            try:
                re.compile(pattern)
            except re.error as error:
                raise PolicyError(f"expected a regular expression, got {pattern!r}: {error}") from error

    def __call__(self, text: str, /) -> list[Found]:
        """Return all matches, pattern by pattern; empty matches are left out."""
        flags = re.IGNORECASE if self.ignore_case else 0
        found = []
        for label, pattern in self.patterns.items():
            for match in re.compile(pattern, flags).finditer(text):  # the module `re` keeps compiled patterns
                start, end = match.span(_first_group(match))
                if start < end:
                    found.append(Found(start, end, self.confidence, label))
        return found


def _first_group(match: re.Match[str]) -> int:
    return next((number for number in range(1, match.re.groups + 1) if match.start(number) >= 0), 0)


def detect(detector: Detector, text: str, min_confidence: float = 0.0) -> list[Found]:
    """Return a detector's finds: in order, those that overlap joined under the surest one's label.

    Raises:
        PolicyError: the detector returned something else than ranges of the text.
    """
    finds = [_checked(detector, find, text) for find in detector(text)]
    return joined(find for find in finds if find.confidence >= min_confidence and find.start < find.end)


def joined(finds: Iterable[Found]) -> list[Found]:
    """Return the finds in order, those that overlap joined; label and confidence are the surest one's."""
    result: list[Found] = []
    for find in sorted(finds):
        if result and find.start < result[-1].end:
            last = result[-1]
            surest = max(last, find, key=lambda either: either.confidence)
            result[-1] = Found(last.start, max(last.end, find.end), surest.confidence, surest.label)
        else:
            result.append(find)
    return result


def check_share(name: str, value: float) -> None:
    """Raise PolicyError unless `value` lies between 0 and 1."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PolicyError(f"expected a number from 0 to 1 for {name}, got {value!r}")


def _checked(detector: Detector, find: Found, text: str) -> Found:
    try:
        start, end, confidence, label = find
        valid = 0 <= start <= end <= len(text) and 0 <= confidence <= 1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        kind = getattr(detector, "__name__", type(detector).__name__)
        raise PolicyError(
            f"expected Found(start, end, confidence, label) inside of the {len(text)} characters from detector "
            f"{kind!r}, got {type(find).__name__} {_numbers(find)}; check the detector"
        )
    return Found(start, end, float(confidence), str(label))


def _numbers(find: object) -> str:
    """Show what a malformed find holds, without text."""
    values = find if isinstance(find, tuple | list) else ()
    return repr(tuple(value if isinstance(value, int | float) else type(value).__name__ for value in values))
