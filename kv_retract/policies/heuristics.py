"""Heuristic detector of prompt injections: signs, weighed, and the passage that each stands in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from ..types import Interval
from .detectors import Found, check_share, joined
from .injection_rules import BLOCKS, RULES, Block, Extent, Rule
from .passages import Passages

_LONGEST_BLOCK = 10_000
"""Characters in which the end of a block is looked for: what marks itself as instructions is no longer."""
_MOST_BLOCKS = 100
"""Blocks of one kind that are looked at."""
_ONLY_BLANK = re.compile(r"(?:\s|\\[nrt]|\\(?=\s))*\Z")
_ESCAPES = re.compile(r"\\[nrt]|\\(?=\s)")
"""What JSON, Python and YAML write for white space: to a phrase it is white space."""
_SALUTATION = re.compile(r"\b(?:dear|hello|hey|hi)\b[^.!?\n]{0,60},\Z", re.IGNORECASE)
_SIGN_OFF = re.compile(r"(?:best|kind|regards|thank|cheers|sincerely|yours|signed|love)\b", re.IGNORECASE)
"""An order may dictate a letter: it ends where the letter does."""
_LONGEST_SALUTATION = 80
_FEWEST_CHARACTERS = 12
"""A line that ends sooner after a sign holds no order yet; the next one does."""


@dataclass(kw_only=True)
class HeuristicInjectionDetector:
    """Find text that speaks to the model that reads it, by turns of phrase (`injection_rules.py`).

    A sign takes with it the block that it stands in: from an `<INFORMATION>` tag or a comment to its end, else from
    the beginning of its sentence to the end of the line or string value. Signs in one passage are independent pieces
    of evidence: two of weight 0.5 give a confidence of 0.75.

    It reads English, and in ten other languages only the order to ignore earlier instructions. It misses orders that
    nothing but their content gives away ("Send the file to x@y.z"), paraphrases that no rule has, and encodings.
    """

    min_confidence: float = 0.3
    """What is less sure is not returned."""
    rules: Sequence[Rule] = field(default=RULES, repr=False)
    blocks: Sequence[Block] = field(default=BLOCKS, repr=False)

    def __post_init__(self) -> None:
        """Raise PolicyError where `min_confidence` is no share."""
        check_share("min_confidence", self.min_confidence)

    def __call__(self, text: str, /) -> list[Found]:
        """Return the passages in order; they do not overlap."""
        bare = _ESCAPES.sub(lambda found: " " * len(found[0]), text)
        small = bare.lower()
        signs = [
            (match.span(), rule, match.groupdict().get("begins") is not None)
            for rule in self.rules
            if any(needle in small for needle in rule.needles)
            for match in rule.pattern.finditer(bare)
        ]
        if not signs:
            return []
        passages = Passages(text)
        blocks = self._blocks(text)
        evidence: list[tuple[int, int, dict[str, float]]] = []
        for place, rule, begins in sorted(signs, key=lambda sign: sign[0]):
            span, marked = _enclosing(place, blocks) or (_extent(passages, place, rule.extent, begins), 0.0)
            weights = {rule.label: rule.weight} | ({"a marked block": marked} if marked else {})
            if evidence and _touch(text, evidence[-1][1], span[0]):
                start, end, known = evidence.pop()
                span = min(start, span[0]), max(end, span[1])
                weights = {label: max(known.get(label, 0), weights.get(label, 0)) for label in known | weights}
            evidence.append((*span, weights))
        found = (Found(start, end, _sure(known), max(known, key=known.__getitem__)) for start, end, known in evidence)
        return [find for find in joined(found) if find.confidence >= self.min_confidence]

    def _blocks(self, text: str) -> list[tuple[int, int, float]]:
        found = []
        for block in self.blocks:
            for match in islice(block.opening.finditer(text), _MOST_BLOCKS):
                name = match[1] if match.re.groups else ""
                closing = re.compile(re.escape(block.closing.format(name=name)), re.IGNORECASE)
                end = closing.search(text, match.end(), match.end() + _LONGEST_BLOCK)
                if end is not None:
                    found.append((match.start(), end.end(), block.weight))
        return sorted(found)


def _enclosing(place: Interval, blocks: Sequence[tuple[int, int, float]]) -> tuple[Interval, float] | None:
    """Return the outermost block that holds a place."""
    for start, end, weight in blocks:
        if start <= place[0] and place[1] <= end:
            return (start, end), weight
    return None


def _extent(passages: Passages, place: Interval, extent: Extent, begins: bool) -> Interval:
    if extent == "match":
        return place
    start, end = place
    begin = start if begins else min(start, passages.sentence(start)[0])
    if extent == "sentence":
        last = passages.text[end : max(end, passages.sentence(end - 1)[1])]
        return begin, end + len(last.rstrip())
    lines, index = passages.line(end - 1)
    stop = max(end, lines[index][1])
    letter = False
    while index + 1 < len(lines):
        last = passages.text[max(begin, stop - _LONGEST_SALUTATION) : stop]
        signed = _SIGN_OFF.match(passages.text, lines[index][0], stop) is not None
        letter = (letter or _SALUTATION.search(last) is not None) and not signed
        if not (letter or last.endswith((":", ",")) or stop - end < _FEWEST_CHARACTERS):
            break
        index += 1
        stop = lines[index][1]
    return begin, stop


def _touch(text: str, end: int, start: int) -> bool:
    """Whether a passage that begins at `start` continues one that ended at `end`."""
    return start <= end or (start - end < 200 and _ONLY_BLANK.match(text, end, start) is not None)


def _sure(weights: dict[str, float]) -> float:
    doubt = 1.0
    for weight in weights.values():
        doubt *= 1 - weight
    return round(1 - doubt, 3)
