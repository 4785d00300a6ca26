"""Long tool results that the model has had its use of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import PolicyError
from ..types import Guarantee, Interval, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .json_items import item_starts
from .steps import answers_after
from .tool_results import any_glob

_REACH = 400
# How far from the wanted place a border is looked for; a cut inside of a word is better than a much smaller span.
_SENTENCE = re.compile(r"[.!?]\s+")
_WORD = re.compile(r"\s+")


@register_policy("oversized")
@dataclass(kw_only=True)
class Oversized(RetractionPolicy):
    """Retract the middle of a long tool result once the model has answered it; head and tail stay.

    The cut is at borders: of items where the result is a JSON list or an object that is mostly one, else of lines,
    sentences or words.

    False positives: whatever the middle said is gone. A later question about it ("and the third flight?") finds
    nothing, and the model may fill the gap from imagination or call the tool again. `keep_steps` and `exclude` say
    how much of that is bearable. A JSON object that is cut at words is no longer one.
    """

    name: ClassVar[str] = "oversized"

    limit: int = 4000
    """Most characters of a result that is left alone."""
    head: int = 1000
    """Characters to keep at the beginning, at least."""
    tail: int = 500
    """Characters to keep at the end, at least."""
    keep_steps: int = 4
    """How many answers of the model must follow a result before it is cut. With 0 the model never reads the middle."""
    min_span: int = 1000
    """Fewest characters worth taking back."""
    tools: Sequence[str] = ("*",)
    """Globs of the tools whose results are cut."""
    exclude: Sequence[str] = ()
    """Globs of tools to leave alone, as those that read what the agent was asked to work on."""
    guarantee: Guarantee = Guarantee.STEERED
    """What the retraction promises."""

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError for sizes that do not fit together."""
        self.guarantee = Guarantee(self.guarantee)
        sizes = {name: getattr(self, name) for name in ("limit", "head", "tail", "keep_steps", "min_span")}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < (name == "min_span"):
                raise PolicyError(f"expected {name} to be a whole number of at least 0 (min_span: 1), got {size!r}")
        if self.head + self.tail + self.min_span > self.limit:
            raise PolicyError(
                f"expected head, tail and min_span to be at most limit together, got {self.head} + {self.tail} + "
                f"{self.min_span} > {self.limit}; a result just above the limit would leave too little to take back"
            )

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the middles in message order."""
        long = [r for r in ctx.tool_results() if len(ctx.messages[r.message].content) > self.limit]
        after = answers_after(ctx.messages) if long else []
        proposals = []
        for result in long:
            content = ctx.messages[result.message].content
            if after[result.message] < self.keep_steps:
                continue
            if any_glob(result.name, self.exclude) or not any_glob(result.name, self.tools):
                continue
            start, end = self._middle(content)
            if end - start >= self.min_span:
                reason = f"the middle of a result of {len(content)} characters; {self.keep_steps} answers followed it"
                span = SpanRef(result.message, start=start, end=end)
                proposals.append(Retraction(span=span, policy=self.name, reason=reason, guarantee=self.guarantee))
        return proposals

    def _middle(self, content: str) -> Interval:
        first, last = self.head, len(content) - self.tail
        items = [start for start in item_starts(content) if first <= start <= last]
        if items and items[-1] - items[0] >= max(self.min_span, (last - first) // 2):
            return items[0], items[-1]
        return _border_after(content, first, last), _border_before(content, first, last)


def _border_after(text: str, first: int, last: int) -> int:
    """Return the first border from `first` on: the best kind that is within reach."""
    if first == 0 or text[first - 1] == "\n":
        return first
    stop = min(first + _REACH, last)
    line = text.find("\n", first, stop)
    if line >= 0:
        return line + 1
    found = _SENTENCE.search(text, first, stop) or _WORD.search(text, first, stop)
    return found.end() if found else first


def _border_before(text: str, first: int, last: int) -> int:
    """Return the last border up to `last`, likewise."""
    begin = max(last - _REACH, first)
    line = text.rfind("\n", begin, last)
    if line >= 0:
        return line + 1
    for pattern in (_SENTENCE, _WORD):
        ends = [match.end() for match in pattern.finditer(text, begin, last)]
        if ends:
            return ends[-1]
    return last
