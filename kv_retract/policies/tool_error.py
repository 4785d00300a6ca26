"""Failed tool calls that a later call repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..types import Guarantee, Retraction, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy
from .tool_results import DEFAULT_ERROR_PATTERN, ToolResult, any_glob, canonical


@register_policy("tool_error")
@dataclass(kw_only=True)
class ToolErrorRecovered(RetractionPolicy):
    """Retract the result of a failed tool call once the same tool has succeeded later.

    False positives: an error can hold a fact that stays true ("payment method not found"); an agent that no longer
    sees it may try the same thing again. And a later success of the same tool need not repair this failure: it may
    serve another request. `same_arguments` narrows that, `exclude` keeps the results of chosen tools. A result that is
    itself a text about errors, and begins with the word, looks like a failure.
    """

    name: ClassVar[str] = "tool_error"

    error_pattern: str = DEFAULT_ERROR_PATTERN
    """Regular expression, matched at the beginning of a result. JSON objects with an error key, a failed status or
    `"success": false` count as errors too."""
    same_arguments: Sequence[str] = ()
    """Names of arguments that the failed and the repairing call must share, as in `("reservation_id",)`."""
    include_call: bool = False
    """Whether the failed call itself goes too, name and arguments."""
    exclude: Sequence[str] = ()
    """Globs of tool names to leave alone."""
    guarantee: Guarantee = Guarantee.STEERED

    def __post_init__(self) -> None:
        """Accept the guarantee as text."""
        self.guarantee = Guarantee(self.guarantee)

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the failed results in message order, each with its call where `include_call`."""
        waiting: dict[tuple[str, str], list[ToolResult]] = {}
        repaired: list[tuple[ToolResult, int]] = []
        for result in ctx.tool_results(self.error_pattern):
            if not result.name or any_glob(result.name, self.exclude):
                continue
            shared = [result.arguments.get(name) for name in self.same_arguments]
            key = (result.name, canonical(shared) if shared else "")
            if result.failed:
                waiting.setdefault(key, []).append(result)
            else:
                repaired += [(failure, result.message) for failure in waiting.pop(key, ())]
        repaired.sort(key=lambda pair: pair[0].message)
        proposals: dict[SpanRef, Retraction] = {}
        for failure, by in repaired:
            for retraction in self._retractions(failure, by):
                proposals.setdefault(retraction.span, retraction)  # one call may have two failed results
        return list(proposals.values())

    def _retractions(self, failure: ToolResult, by: int) -> list[Retraction]:
        reason = f"{failure.name} failed; the call answered in message {by} succeeded"
        spans = failure.spans(include_call=self.include_call)
        return [Retraction(span=span, policy=self.name, reason=reason, guarantee=self.guarantee) for span in spans]
