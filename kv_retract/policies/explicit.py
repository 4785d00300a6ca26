"""What the caller names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import PolicyError, SpanError
from ..spans import check_span
from ..types import Guarantee, Message, Retraction, Scope, SpanRef
from .base import PolicyContext, RetractionPolicy, register_policy


@register_policy("explicit")
@dataclass(kw_only=True)
class Explicit(RetractionPolicy):
    """Retract what the caller names: places, occurrences of a text, or tool results by the id of their call.

    There are no false positives but the caller's. A place that is not in the messages is an error, never ignored:
    whoever asks for a deletion must learn that nothing was deleted. `match` finds literal text only: a copy with
    another case, spacing or JSON escaping stays, and so does reasoning text.
    """

    name: ClassVar[str] = "explicit"

    spans: Sequence[SpanRef | Mapping[str, Any]] = ()
    """Places; a mapping has the fields of `SpanRef`, as in `{"message": 3, "start": 10, "end": 20}`."""
    match: str | None = None
    """Text to find: every occurrence in message contents and tool-call arguments that does not overlap another."""
    message: int | None = None
    """Where to look for `match`: only in the message with this index."""
    tool_call_ids: Sequence[str] = ()
    """Ids of calls whose results to take back."""
    reason: str = "named by the caller"
    guarantee: Guarantee = Guarantee.STEERED
    scope: Scope | None = None
    notice: str | None = None
    """Text for the model; it goes with the first retraction only, so it is said once."""

    def __post_init__(self) -> None:
        """Accept guarantee and scope as text; raises PolicyError where the parameters name nothing."""
        self.guarantee = Guarantee(self.guarantee)
        self.scope = None if self.scope is None else Scope(self.scope)
        if self.match == "" or not (self.spans or self.match or self.tool_call_ids):
            raise PolicyError("policy 'explicit' names nothing; give spans, a non-empty match, or tool_call_ids")
        if self.message is not None and self.match is None:
            raise PolicyError(f"got message={self.message!r} without match; name a whole message in spans")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the named spans: `spans` first, then `tool_call_ids`, then occurrences of `match`.

        Raises:
            SpanError: a span, the text, or the result of a call is not in the messages.
            PolicyError: a mapping in `spans` is not a span.
        """
        found = [_checked(span, ctx.messages) for span in self.spans]
        found += self._results(ctx.messages)
        if self.match is not None:
            found += self._matches(ctx.messages, self.match)
        return [
            Retraction(
                span=span,
                policy=self.name,
                reason=self.reason,
                guarantee=self.guarantee,
                scope=self.scope,
                notice=self.notice if number == 0 else None,
            )
            for number, span in enumerate(dict.fromkeys(found))
        ]

    def _results(self, messages: Sequence[Message]) -> list[SpanRef]:
        wanted = set(self.tool_call_ids)
        found = [i for i, m in enumerate(messages) if m.role == "tool" and m.tool_call_id in wanted]
        missing = wanted - {str(messages[i].tool_call_id) for i in found}
        if missing:
            raise SpanError(
                f"expected a tool result for each of the named calls, got none for {sorted(missing)!r} in "
                f"{len(messages)} messages; check tool_call_ids"
            )
        return [SpanRef(i) for i in found]

    def _matches(self, messages: Sequence[Message], text: str) -> list[SpanRef]:
        if self.message is not None and not 0 <= self.message < len(messages):
            raise SpanError(f"expected a message from 0 to {len(messages) - 1}, got {self.message!r}")
        indices = range(len(messages)) if self.message is None else (self.message,)
        found = [span for index in indices for span in _occurrences(messages[index], index, text)]
        if not found:
            place = "any message" if self.message is None else f"message {self.message}"
            raise SpanError(
                f"the text to match ({len(text)} characters) is not in {place}; it must match literally, with its "
                "case and spacing"
            )
        return found


def _occurrences(message: Message, index: int, text: str) -> Iterator[SpanRef]:
    for start in _find_all(message.content, text):
        yield SpanRef(index, "content", 0, start, start + len(text))
    for number, call in enumerate(message.tool_calls):
        for start in _find_all(call.arguments, text):
            yield SpanRef(index, "tool_call", number, start, start + len(text))


def _find_all(haystack: str, needle: str) -> Iterator[int]:
    at = haystack.find(needle)
    while at >= 0:
        yield at
        at = haystack.find(needle, at + len(needle))


def _checked(span: SpanRef | Mapping[str, Any], messages: Sequence[Message]) -> SpanRef:
    if not isinstance(span, SpanRef):
        try:
            span = SpanRef(**span)
        except TypeError as error:
            raise PolicyError(f"expected message, part, call, start and end of a span, got {span!r}") from error
    check_span(span, messages)
    return span
