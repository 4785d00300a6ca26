"""Policies made of policies. What they propose keeps the name of the policy that found it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import PolicyError
from ..types import Message, Retraction, SpanRef
from .base import PolicyContext, register_policy
from .overlaps import Overlaps
from .wrapping import WrapperOfMany, WrapperOfOne


@register_policy("any_of")
@dataclass(kw_only=True)
class AnyOf(WrapperOfMany):
    """Propose what any of the inner policies proposes.

    Of several proposals for one span the first with the strongest guarantee stands, with the highest confidence of
    all. Spans that only overlap stay apart: the planner merges them. False positives: those of every inner policy.
    """

    name: ClassVar[str] = "any_of"

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the proposals in the order of the policies, each span once."""
        return _once(r for policy in self.inner() for r in policy.proposals(ctx))


@register_policy("all_of")
@dataclass(kw_only=True)
class AllOf(WrapperOfMany):
    """Propose what the first policy proposes, where each of the others proposes a span that overlaps it.

    The first one finds, the others confirm: the span is the first one's, never an intersection, so that nothing is
    taken back in part which no policy means as a whole. The guarantee is the strongest of the proposals that overlap,
    the confidence that of the least sure policy; of one policy's several spans the surest counts. False positives:
    two policies can mean different things in one span.
    """

    name: ClassVar[str] = "all_of"

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return those of the first policy's proposals that the others confirm."""
        first, *others = self.inner()
        found = _once(first.proposals(ctx))
        for policy in others:
            overlaps = Overlaps(policy.proposals(ctx), ctx.messages)
            found = [_confirmed(r, by) for r in found if (by := overlaps.of(r))]
        return found


@register_policy("min_confidence")
@dataclass(kw_only=True)
class MinConfidence(WrapperOfOne):
    """Propose only what the inner policy is sure enough of. False positives: a policy may be sure and wrong."""

    name: ClassVar[str] = "min_confidence"

    at_least: float
    """From 0 to 1; a proposal with this confidence stays."""

    def __post_init__(self) -> None:
        """Check the threshold."""
        super().__post_init__()
        if not 0 <= self.at_least <= 1:
            raise PolicyError(f"expected at_least from 0 to 1, got {self.at_least!r}")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the proposals with at least this confidence."""
        return [r for policy in self.inner() for r in policy.proposals(ctx) if r.confidence >= self.at_least]


@register_policy("cooldown")
@dataclass(kw_only=True)
class Cooldown(WrapperOfOne):
    """Propose at most so many retractions in so many steps of a thread; the rest waits for a later step.

    A step is an assistant message. When a retraction was made is read from its record: the window of a record with
    scope `branch` ends at the newest message of that moment. A record with scope `thread` does not tell, and counts
    from its span's message on: so an old span that was taken back just now is not counted. What has a record already
    passes, so a retry proposes the same. There is no clock and no state; records that the inner policy did not find
    do not count. It is no detector: its false positives are the inner policy's.
    """

    name: ClassVar[str] = "cooldown"

    most: int
    """How many retractions, at least 1."""
    steps: int
    """In how many steps, the next one included; at least 1."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        if self.most < 1 or self.steps < 1:
            raise PolicyError(f"expected most and steps of at least 1, got most={self.most!r}, steps={self.steps!r}")

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return what has a record already and, of the rest, as many as the last steps leave room for."""
        [policy] = self.inner()
        first = _first_message(ctx.messages, self.steps)
        finders, room = self.finders(), self.most
        for record in ctx.records:
            if record.policy in finders and record.span.message + record.window_size > first:
                room -= 1
        known = {record.span for record in ctx.records}
        passed = []
        for retraction in policy.proposals(ctx):
            if retraction.span not in known:
                if room <= 0:
                    continue
                room -= 1
            passed.append(retraction)
        return passed


def _once(proposals: Iterable[Retraction]) -> list[Retraction]:
    best: dict[SpanRef, Retraction] = {}
    for new in proposals:
        old = best.setdefault(new.span, new)
        stronger = old.guarantee.stronger(new.guarantee) is not old.guarantee
        best[new.span] = replace(
            new if stronger else old,
            confidence=max(old.confidence, new.confidence),
            cascade=old.cascade.wider(new.cascade),
            verify=max(old.verify, new.verify),
        )
    return list(best.values())


def _confirmed(retraction: Retraction, by: Sequence[Retraction]) -> Retraction:
    guarantee, cascade = retraction.guarantee, retraction.cascade
    for other in by:
        guarantee, cascade = guarantee.stronger(other.guarantee), cascade.wider(other.cascade)
    confidence = min(retraction.confidence, max(other.confidence for other in by))
    verify = max(retraction.verify, *(other.verify for other in by))
    return replace(retraction, guarantee=guarantee, confidence=confidence, cascade=cascade, verify=verify)


def _first_message(messages: Sequence[Message], steps: int) -> int:
    """Return the index behind the last assistant message that is too old: the last `steps - 1` are not."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            steps -= 1
            if steps <= 0:
                return index + 1
    return 0
