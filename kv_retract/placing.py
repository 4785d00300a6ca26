"""Where proposals stand: joined in the text, trimmed to what is not retracted yet, located in the tokens.

Characters of a part are counted as in `spans.extent`.
"""

from __future__ import annotations

import dataclasses
import functools
from bisect import insort
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

from .errors import SpanError
from .spans import MessagePart, clip, extent, part_of, subtract, union
from .types import Cascade, Dropped, Guarantee, Interval, Message, Retraction, RetractionRecord, Scope, SpanRef, Status

_COVERED = "already retracted"


class SupportsIntervals(Protocol):
    """What the planner needs of a rendered thread."""

    @property
    def ids(self) -> Sized:
        """Token ids of the whole thread."""

    def interval(self, ref: SpanRef, /) -> Interval:
        """Tokens that hold the span; raises SpanError where it cannot be located."""

    def leaves_out(self, ref: SpanRef, /) -> bool:
        """Whether the span is certainly not in the rendering."""


@dataclass(frozen=True, slots=True)
class Place:
    """A retraction and the tokens where it stands."""

    retraction: Retraction
    start: int
    end: int
    why_exact: str = ""


def merge(
    proposals: Iterable[Retraction],
    messages: Sequence[Message],
    records: Sequence[RetractionRecord],
    dropped: list[Dropped],
) -> list[Retraction]:
    """Join the proposals that overlap in one part; return them in order of (message, part, call, start).

    Characters that a revoked record covers are left out of the proposals of its policies, `explicit` aside.
    """
    revoked = [record for record in records if record.status is Status.REVOKED]
    names = {name for record in revoked for name in record.policy.split("+")} - {"explicit"}
    vetoed = {name: _covered((r for r in revoked if name in r.policy.split("+")), messages) for name in names}
    ranged = []
    for proposal in proposals:
        veto = vetoed.get(proposal.policy, {}).get(part_of(proposal.span), ())
        pieces = subtract(extent(proposal.span, messages), veto)
        if not pieces:
            dropped.append(drop(proposal, "revoked earlier"))
        ranged += [(proposal, piece) for piece in pieces]
    ranged.sort(key=lambda pair: (part_of(pair[0].span), pair[1], pair[0].policy, pair[0].reason))
    groups: list[list[Retraction]] = []
    extents: list[Interval] = []
    for proposal, (start, end) in ranged:
        if groups and part_of(groups[-1][0].span) == part_of(proposal.span) and start < extents[-1][1]:
            groups[-1].append(proposal)
            extents[-1] = (extents[-1][0], max(extents[-1][1], end))
        else:
            groups.append([proposal])
            extents.append((start, end))
    return [_with_characters(_join(g), characters, messages) for g, characters in zip(groups, extents, strict=True)]


def without_retracted(
    retractions: Iterable[Retraction],
    messages: Sequence[Message],
    records: Sequence[RetractionRecord],
    dropped: list[Dropped],
) -> list[Retraction]:
    """Trim the retractions to the characters that no standing record covers; one may fall into pieces.

    A whole tool call of which a part is retracted keeps its name: only what is left of its arguments is retracted.
    """
    standing = [record for record in records if record.status is not Status.REVOKED]
    covered = _covered(standing, messages)
    result = []
    for retraction in retractions:
        own = extent(retraction.span, messages)
        pieces = subtract(own, covered.get(part_of(retraction.span), ()))
        if pieces != [own]:
            pieces = [(max(start, 0), end) for start, end in pieces if end > max(start, 0)]
        why = _why_covered(retraction, standing, messages)
        if not pieces or why != _COVERED:
            dropped.append(drop(retraction, why))
        for number, piece in enumerate(pieces):
            trimmed = _with_characters(retraction, piece, messages)
            # The notice is said once, with the first piece.
            result.append(trimmed if number == 0 else dataclasses.replace(trimmed, notice=None))
    return result


def locate(
    retractions: Iterable[Retraction],
    rendering: SupportsIntervals,
    records: Sequence[RetractionRecord],
    dropped: list[Dropped],
) -> list[Place]:
    """Find the tokens of each retraction; return the places in token order, apart from each other and from records.

    Raises:
        SpanError: one by the policy `explicit` cannot be located, and is not the rest of a part that is retracted.
    """
    taken = union(_record_intervals(rendering, records))
    begun = {part_of(record.span) for record in records if record.status is not Status.REVOKED}
    places = []
    for retraction in retractions:
        if part_of(retraction.span) in begun and rendering.leaves_out(retraction.span):
            dropped.append(drop(retraction, "empty: the template shows nothing of it"))
            continue
        try:
            interval = rendering.interval(retraction.span)
        except SpanError as error:
            refuse(retraction, str(error), error, dropped)
            continue
        start, end = clip(interval, taken)
        if start == end:
            dropped.append(drop(retraction, "empty: no tokens of its own"))
            continue
        insort(taken, (start, end))
        places.append(Place(retraction, start, end))
    return sorted(places, key=lambda place: place.start)


def drop(retraction: Retraction, why: str) -> Dropped:
    """Say why a retraction is not planned."""
    return Dropped(span=retraction.span, policy=retraction.policy, why=why)


def refuse(retraction: Retraction, why: str, error: SpanError, dropped: list[Dropped]) -> None:
    """Drop a retraction whose span is wrong; raise instead where the caller named the span (policy `explicit`)."""
    if "explicit" in retraction.policy.split("+"):
        raise SpanError(f"policy {retraction.policy!r}: {why}") from error
    dropped.append(drop(retraction, f"bad span: {why}"))


def _with_characters(retraction: Retraction, characters: Interval, messages: Sequence[Message]) -> Retraction:
    """Name the same place always alike, since records are identified by their span: `end` is None for a whole part."""
    message, part, call = part_of(retraction.span)
    whole = SpanRef(message, retraction.span.part, call)
    span = whole
    if extent(whole, messages) != characters:
        span = dataclasses.replace(whole, start=max(characters[0], 0), end=characters[1])
    return retraction if span == retraction.span else dataclasses.replace(retraction, span=span)


def _covered(records: Iterable[RetractionRecord], messages: Sequence[Message]) -> dict[MessagePart, list[Interval]]:
    covered: dict[MessagePart, list[Interval]] = {}
    for record in records:
        covered.setdefault(part_of(record.span), []).append(extent(record.span, messages))
    return covered


def _why_covered(retraction: Retraction, standing: Sequence[RetractionRecord], messages: Sequence[Message]) -> str:
    """Say why what records cover is not planned again: the same, unless it is to be exact and was only steered."""
    steered = _covered((r for r in standing if r.status is Status.STEERED), messages)
    own = extent(retraction.span, messages)
    left = subtract(own, steered.get(part_of(retraction.span), ()))
    if retraction.guarantee is not Guarantee.EXACT or left == [own]:
        return _COVERED
    return (
        f"already retracted{', in part' if left else ''}, but steered: set it to exact in the ledger to have it rebuilt"
    )


def _record_intervals(rendering: SupportsIntervals, records: Iterable[RetractionRecord]) -> list[Interval]:
    intervals = []
    for record in records:
        if record.status is Status.REVOKED:
            continue
        try:
            intervals.append(rendering.interval(record.span))
        except SpanError:
            # The template no longer shows the span (the reasoning of earlier turns), so nothing can overlap it.
            continue
    return intervals


def _join(group: Sequence[Retraction]) -> Retraction:
    if len(group) == 1:
        return group[0]
    exact = any(r.guarantee is Guarantee.EXACT for r in group)
    scopes = {r.scope or (Scope.THREAD if r.guarantee is Guarantee.EXACT else Scope.BRANCH) for r in group}
    notices = dict.fromkeys(r.notice for r in group if r.notice)
    # What a policy found by itself stands by itself, whatever else a cascade would have brought.
    origins = () if any(not r.derived_from for r in group) else dict.fromkeys(o for r in group for o in r.derived_from)
    return Retraction(
        span=group[0].span,
        policy="+".join(dict.fromkeys(r.policy for r in group)),
        reason="; ".join(dict.fromkeys(r.reason for r in group)),
        guarantee=Guarantee.EXACT if exact else Guarantee.STEERED,
        scope=Scope.THREAD if Scope.THREAD in scopes else Scope.BRANCH,
        confidence=max(r.confidence for r in group),
        notice="\n".join(notices) or None,
        cascade=functools.reduce(Cascade.wider, (r.cascade for r in group)),
        verify=max(r.verify for r in group),
        derived_from=tuple(origins),
    )
