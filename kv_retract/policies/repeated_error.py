"""Failures that the thread has seen before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import PolicyError
from ..types import Guarantee, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .steps import answers_after
from .tool_results import DEFAULT_ERROR_PATTERN, ToolResult, any_glob

Alike = Literal["call", "tool"]
Keep = Literal["newest", "first"]

_EDGE = 400
# Errors are compared by their beginning and end: a long one shows input or a stack between them.
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d.,:/-]*(?!\w)")


@register_policy("repeated_error")
@dataclass(kw_only=True)
class RepeatedError(RetractionPolicy):
    """Retract all but one of a tool's errors that are alike: many examples of a mistake teach the model to repeat it.

    Errors are alike where the same call, by tool and arguments, failed with the same text but for numbers, case and
    white space; with `alike="tool"`, whatever the arguments. The one that stays says what there is to know.

    False positives: a count that matters ("tried three times, now escalate") is lost. With `alike="tool"` errors that
    differ in a number go as well, and with them the fact about other arguments: "total price is 305" was true of
    another order, and that order 17 does not exist says nothing about order 18. A result that is itself a text about
    errors, and begins with the word, looks like a failure.
    """

    name: ClassVar[str] = "repeated_error"

    limit: int = 1
    """How many alike errors may stand; of more, one is kept."""
    alike: Alike = "call"
    """Whether alike errors come from equal arguments (`call`) or from any (`tool`)."""
    keep: Keep = "newest"
    """Which one is kept. With `first`, a newer one goes only after the model has answered it."""
    include_call: bool = False
    """Whether the failed calls go too, name and arguments."""
    exclude: Sequence[str] = ()
    """Globs of tool names to leave alone, as those that are polled until they succeed."""
    error_pattern: str = DEFAULT_ERROR_PATTERN
    """Regular expression, matched at the beginning of a result. JSON objects with an error key, a failed status or
    `"success": false` count as errors too."""
    guarantee: Guarantee = Guarantee.STEERED
    """What the retraction promises."""

    def __post_init__(self) -> None:
        """Accept the guarantee as text; raises PolicyError where a parameter is none of what it can be."""
        self.guarantee = Guarantee(self.guarantee)
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:
            raise PolicyError(
                f"expected a limit of at least 1 error, got {self.limit!r}; use 'tool_error' to keep none"
            )
        for name, value, known in (("alike", self.alike, ("call", "tool")), ("keep", self.keep, ("newest", "first"))):
            if value not in known:
                raise PolicyError(f"expected {name} to be {known[0]!r} or {known[1]!r}, got {value!r}")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the errors that go in message order, each with its call where `include_call`."""
        groups: dict[tuple[str, str, str], list[ToolResult]] = {}
        for result in ctx.tool_results(self.error_pattern):
            if result.failed and result.name and not any_glob(result.name, self.exclude):
                arguments = result.raw_arguments if self.alike == "call" else ""
                key = (result.name, arguments, signature(ctx.messages[result.message].content))
                groups.setdefault(key, []).append(result)
        alike = [group for group in groups.values() if len(group) > self.limit]
        after = answers_after(ctx.messages) if alike else []
        repeated = [
            (result, len(group))
            for group in alike
            for result in (group[:-1] if self.keep == "newest" else group[1:])
            if self.keep == "newest" or after[result.message]
        ]
        proposals: dict[SpanRef, Retraction] = {}
        for result, count in sorted(repeated, key=lambda pair: pair[0].message):
            for retraction in self._retractions(result, count):
                proposals.setdefault(retraction.span, retraction)  # one call may have two failed results
        return list(proposals.values())

    def _retractions(self, result: ToolResult, count: int) -> list[Retraction]:
        reason = f"{result.name} failed {count} times alike; the {self.keep} error says it"
        spans = result.spans(include_call=self.include_call)
        return [Retraction(span=span, policy=self.name, reason=reason, guarantee=self.guarantee) for span in spans]


def signature(error: str) -> str:
    """Return text that is equal for errors that are equal but for numbers, case and white space."""
    edges = error if len(error) <= 2 * _EDGE else f"{error[:_EDGE]} {error[-_EDGE:]}"
    return " ".join(_NUMBER.sub("#", edges).split()).casefold()
