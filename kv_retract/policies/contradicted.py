"""Values that a later tool result gives otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import PolicyError
from ..ledger.recent import Kept
from ..types import Guarantee, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .json_facts import About, FactReader, agree
from .json_nodes import locate
from .superseded import DEFAULT_KEYS
from .tool_results import DEFAULT_ERROR_PATTERN, ToolResult, any_glob

ENTITY_KEYS = (*DEFAULT_KEYS, "*_number", "*Number", "uuid", "sku", "isbn", "email", "symbol", "ticker")
"""Globs of JSON keys that say which entity an object is about."""

QUALIFIERS = ("date", "day", "month", "year", "currency", "unit", "units", "language", "locale", "timezone", "version")
"""Names under whose values a fact holds: a price of Monday does not contradict one of Tuesday."""

VARYING = (
    "*_at", "*At", "timestamp", "*_timestamp", "time", "now", "*_ago", "age", "elapsed*", "duration*", "score", "rank",
    "relevance", "similarity", "distance", "position", "page", "page_*", "offset", "cursor", "*_cursor", "*token",
    "etag", "hash", "checksum",
)  # fmt: skip
"""Globs of keys that differ from result to result although nothing was changed."""

# A key may itself be data, as in {"ann@example.org": 3}, and a reason is kept: only a plain word is told.
_PLAIN_NAME = re.compile(r"[A-Za-z_]{1,40}")


@register_policy("contradicted")
@dataclass(kw_only=True)
class ContradictedValue(RetractionPolicy):
    """Retract a value in a tool result once a later result gives the same entity another value for the same key.

    Both results are JSON and succeeded. Objects are about the same entity where they have the same keys of `keys`
    with the same values, stand in the same entities, and agree in their `qualifiers`, which the call's arguments may
    give; see `json_facts.py`. Plain values of one type are compared: 12 equals 12.0, text without case and spacing.
    Null, a missing key, long text, and lists of plain values contradict nothing. A write that answers with the new
    state counts as a later result, and so the value that was read before it goes.

    Two results of the same call are left to `superseded`, unless `same_call`.

    False positives: the later result is believed, whoever gives it: a tool that is wrong, or that an attacker writes
    in, takes true values back (`exclude`). Two tools may mean different things by one key (price with and without
    tax), and a fact may depend on an argument that `qualifiers` do not name: a quote for two seats, a count within a
    filter. A user who asks "what was it before?" finds nothing. It misses objects that do not name their entity, as
    in `{"price": 5}`.
    """

    name: ClassVar[str] = "contradicted"

    keys: Sequence[str] = ENTITY_KEYS
    """Globs of JSON keys that identify an entity; also of arguments, where a result does not repeat them."""
    qualifiers: Sequence[str] = QUALIFIERS
    """Globs of JSON keys and arguments that must agree, though they identify nothing."""
    compare: Sequence[str] = ("*",)
    """Globs of JSON keys to compare, by name or by path, as in `price` or `prices.economy`."""
    ignore: Sequence[str] = VARYING
    """Globs of JSON keys that may differ, by name or by path."""
    inherit: bool = True
    """Whether an object within another entity is another there, as a line of an order is. False compares objects with
    equal keys wherever they stand."""
    exclude: Sequence[str] = ()
    """Globs of tools whose results are neither believed nor taken back, as those of a random number."""
    same_call: bool = False
    """Whether results of the same tool with equal arguments are compared too."""
    whole: bool = False
    """Whether the whole older result goes, and not only the value."""
    error_pattern: str = DEFAULT_ERROR_PATTERN
    """Regular expression, matched at the beginning of a result: what failed says nothing."""
    guarantee: Guarantee = Guarantee.STEERED
    """What the retraction promises."""
    _reader: Kept[FactReader] = field(default_factory=lambda: Kept(_reader), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError where nothing can be found."""
        self.guarantee = Guarantee(self.guarantee)
        for name, globs in (("keys", self.keys), ("compare", self.compare)):
            if isinstance(globs, str) or not globs:
                raise PolicyError(f"expected a list of globs as {name}, got {globs!r}; without one nothing is compared")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the contradicted values in the order of the text; the first other value gives the reason."""
        settings = self.keys, self.qualifiers, self.compare, self.ignore
        reader = self._reader.of(*map(tuple, settings), self.inherit)
        standing: dict[About, tuple[Any, list[ToolResult]]] = {}
        stale: dict[int, dict[About, str]] = {}
        results = [r for r in ctx.tool_results(self.error_pattern) if self._is_believed(r)]
        for result in results:
            content = ctx.messages[result.message].content
            for about, value in reader.facts(content, result).items():
                stands = standing.get(about)
                if stands is not None and agree(stands[0], value):
                    stands[1].append(result)
                    continue
                for older in stands[1] if stands else ():
                    if self.same_call or not _same_call(older, result):
                        stale.setdefault(older.message, {})[about] = _reason(result, about)
                standing[about] = (value, [result])
        return [
            Retraction(span=span, policy=self.name, reason=reason, guarantee=self.guarantee)
            for result in results
            if result.message in stale
            for span, reason in self._spans(result, ctx.messages[result.message].content, reader, stale[result.message])
        ]

    def _is_believed(self, result: ToolResult) -> bool:
        return bool(result.name) and not result.failed and not any_glob(result.name, self.exclude)

    def _spans(
        self, result: ToolResult, content: str, reader: FactReader, reasons: Mapping[About, str]
    ) -> list[tuple[SpanRef, str]]:
        if self.whole:
            return [(SpanRef(result.message), next(iter(reasons.values())))]
        places = reader.places(content, result)
        why = {place: reason for about, reason in reasons.items() for place in places[about]}
        spans = zip(locate(content, tuple(why)), why.values(), strict=True)
        return [(SpanRef(result.message, start=start, end=end), reason) for (start, end), reason in sorted(spans)]


def _same_call(one: ToolResult, other: ToolResult) -> bool:
    return one.name == other.name and one.raw_arguments == other.raw_arguments


def _reason(result: ToolResult, about: About) -> str:
    key = about[1][-1]
    what = f"another value of {key}" if _PLAIN_NAME.fullmatch(key) else "another value"
    return f"{result.name} in message {result.message} gives {what}"


def _reader(
    keys: Sequence[str], qualifiers: Sequence[str], compare: Sequence[str], ignore: Sequence[str], inherit: bool
) -> FactReader:
    return FactReader(keys=keys, qualifiers=qualifiers, compare=compare, ignore=ignore, inherit=inherit)
