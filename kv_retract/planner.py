"""From proposals to a plan: protect, merge, trim, choose exact or steered, keep within the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from .errors import SpanError
from .ledger.ledger import record_for
from .placing import Place, SupportsIntervals, drop, locate, merge, refuse, without_retracted
from .spans import check_span, overlap
from .types import Dropped, Guarantee, Hop, Message, PlannedSpan, Retraction, RetractionPlan, RetractionRecord, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class EraserFacts:
    """What the planner needs to know of an eraser."""

    eraser_id: str
    closes_gap: bool = False
    suffix_free: bool = False
    exact: bool = False
    """Whether the edit equals a fresh prefill without the span."""
    recomputed: Callable[[int, int, int], int] = lambda prefix, span, suffix: 0
    """`(prefix, span, suffix)` in tokens -> tokens that the edit of one span sends through the model, where the suffix
    ends with the next span."""


@dataclass(kw_only=True)
class Planner:
    """Turns what policies propose into what will be done; keeps no state between plans."""

    protect_system: bool = True
    """Whether system messages are never retracted."""
    protect_newest_user: bool = True
    """Whether the newest user message is never retracted; the newest tool result may be."""
    exact_suffix: int = 64
    """With at most this many cached tokens after a span the suffix is recomputed: exact, and cheaper than an edit.
    0 turns this off."""
    budget: int | None = None
    """Most tokens that the edits of one step may send through the model, those with `Guarantee.EXACT` not counted.
    Spans beyond it are dropped; policies propose them again before the next step, but not what a cascade brought, which
    is looked at once."""
    min_guarantee: Guarantee = Guarantee.STEERED
    """Weakest guarantee of every planned span; it may only strengthen what a policy asks for."""

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        self.min_guarantee = Guarantee(self.min_guarantee)
        if self.exact_suffix < 0 or (self.budget is not None and self.budget < 0):
            raise ValueError(
                f"expected exact_suffix and budget of at least 0 tokens, got {self.exact_suffix!r} and {self.budget!r}"
            )

    def plan(
        self,
        proposals: Sequence[Retraction],
        *,
        thread_id: str,
        messages: Sequence[Message],
        rendering: SupportsIntervals,
        records: Sequence[RetractionRecord],
        num_cached: int,
        eraser: EraserFacts,
        hops: Sequence[Hop] = (),
        now: str | None = None,
    ) -> RetractionPlan:
        """Plan one step of one thread; changes nothing.

        Args:
            proposals: of all policies, in any order; which spans are planned does not depend on it.
            thread_id: label of the thread.
            messages: all messages of the thread.
            rendering: the thread rendered, originals in place.
            records: retractions that stand in these messages, `span.message` as of now. Those with `Status.REVOKED`
                are vetoes: their policies cannot retract these characters again; `explicit` always may.
            num_cached: how many leading tokens of `rendering` are cached.
            eraser: the session's eraser.
            hops: how proposals with `derived_from` were derived; the plan carries them on.
            now: ISO 8601 in UTC for the new records; by default the clock.

        Raises:
            SpanError: a span of the policy `explicit` is not in the messages or cannot be located in the rendering.
                Such spans of other policies are dropped.
        """
        dropped: list[Dropped] = []
        admitted = self._admitted(proposals, messages, dropped)
        merged = merge(admitted, messages, records, dropped)
        places = locate(without_retracted(merged, messages, records, dropped), rendering, records, dropped)
        chosen = self._choose(places, num_cached, eraser, dropped)
        while orphans := _orphans(chosen, records):
            dropped += [drop(place.retraction, "derived from a span that stays") for place in orphans]
            places = [place for place in chosen if place not in orphans]
            chosen = self._choose(places, num_cached, eraser, dropped)
        now = now or datetime.now(UTC).isoformat(timespec="seconds")
        spans = _linked([_planned(place, messages, thread_id, eraser, now) for place in chosen], chosen, records)
        gone = [*(span.record.span for span in spans), *(r.span for r in records)]
        return RetractionPlan(
            thread_id=thread_id,
            spans=spans,
            dropped=tuple(dropped),
            hops=tuple(hop for hop in hops if any(overlap(hop.target, span) for span in gone)),
            eraser_id=eraser.eraser_id,
            num_tokens=len(rendering.ids),
            num_cached_tokens=num_cached,
        )

    def _admitted(
        self, proposals: Iterable[Retraction], messages: Sequence[Message], dropped: list[Dropped]
    ) -> list[Retraction]:
        newest_user = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
        admitted = []
        for proposal in proposals:
            span = proposal.span
            try:
                length = check_span(span, messages)
            except SpanError as error:
                refuse(proposal, str(error), error, dropped)
                continue
            whole_call = span.part == "tool_call" and span.start == 0 and span.end is None
            if self.protect_system and messages[span.message].role == "system":
                dropped.append(drop(proposal, "protected: system prompt"))
            elif self.protect_newest_user and span.message == newest_user:
                dropped.append(drop(proposal, "protected: newest user message"))
            elif span.start == (length if span.end is None else span.end) and not whole_call:
                dropped.append(drop(proposal, "empty"))
            else:
                guarantee = proposal.guarantee.stronger(self.min_guarantee)
                admitted.append(dataclasses.replace(proposal, guarantee=guarantee))
        return admitted

    def _choose(
        self, places: Sequence[Place], num_cached: int, eraser: EraserFacts, dropped: list[Dropped]
    ) -> list[Place]:
        """Decide for each place, last first: an earlier edit costs what the later ones cost, and more."""
        demanded = min((p.start for p in places if p.retraction.guarantee is Guarantee.EXACT), default=num_cached)
        state = _Edit(limit=min(demanded, num_cached))
        chosen = []
        for place in reversed(places):
            why = self._why_exact(place, num_cached, demanded, eraser)
            free = why in ("guarantee", "not cached") or place.start > demanded
            after = state if free else state.with_place(place, exact=bool(why) or eraser.exact, eraser=eraser)
            if self.budget is not None and after.cost > self.budget:
                dropped.append(drop(place.retraction, "over budget"))
                continue
            state = after
            chosen.append(dataclasses.replace(place, why_exact=why))
        return chosen[::-1]

    def _why_exact(self, place: Place, num_cached: int, demanded: int, eraser: EraserFacts) -> str:
        # Each reason holds for all later places too, so what follows an exact span is exact.
        if place.retraction.guarantee is Guarantee.EXACT:
            return "guarantee"
        if place.end > num_cached:
            return "not cached"
        if place.start > demanded:
            return "follows an exact span"
        if not eraser.exact and 0 < self.exact_suffix >= num_cached - place.end:
            return "short suffix"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edit:
    """The edit of one step as far as it is chosen, built from its end to its beginning."""

    limit: int
    """Where the cached suffix of the next span ends: at the span behind it, or where what follows is recomputed or
    prefilled whatever is chosen."""
    cost: int = 0
    """Tokens through the model."""

    def with_place(self, place: Place, *, exact: bool, eraser: EraserFacts) -> _Edit:
        """Return the edit with one more place, which lies before all others."""
        suffix = max(0, self.limit - place.end)
        tokens = suffix if exact else eraser.recomputed(place.start, place.end - place.start, suffix)
        return _Edit(limit=place.start, cost=self.cost + tokens)


def _planned(place: Place, messages: Sequence[Message], thread_id: str, eraser: EraserFacts, now: str) -> PlannedSpan:
    exact = bool(place.why_exact) or eraser.exact
    record = record_for(
        place.retraction,
        messages,
        thread_id=thread_id,
        eraser_id=eraser.eraser_id,
        closes_gap=eraser.closes_gap,
        shared=eraser.suffix_free,
        exact=exact,
        now=now,
        span_tokens=place.end - place.start,
    )
    return PlannedSpan(
        record=record,
        start=place.start,
        end=place.end,
        exact=exact,
        why_exact=place.why_exact,
        # Drawn from the id, so that a retry or another replica draws the same.
        verify=not exact and int(record.retraction_id, 16) < place.retraction.verify * 16 ** len(record.retraction_id),
    )


def _orphans(places: Sequence[Place], records: Sequence[RetractionRecord]) -> list[Place]:
    """Return derived places of which nothing takes back what they were derived from: it was dropped."""
    taken = [p.retraction.span for p in places if not p.retraction.derived_from]
    taken += [r.span for r in records if r.status is not Status.REVOKED]
    derived = [(p, p.retraction.derived_from) for p in places if p.retraction.derived_from]
    return [p for p, origins in derived if not any(overlap(o, span) for o in origins for span in taken)]


def _linked(
    spans: Sequence[PlannedSpan], places: Sequence[Place], records: Sequence[RetractionRecord]
) -> tuple[PlannedSpan, ...]:
    """Name in the record of a derived span the retraction that it came with: of this plan, or made earlier."""
    known = [*(span.record for span in spans), *(r for r in records if r.status is not Status.REVOKED)]
    linked = []
    for span, place in zip(spans, places, strict=True):
        origins = [
            next((r.retraction_id for r in known if overlap(r.span, origin)), None)
            for origin in place.retraction.derived_from
        ]
        found = tuple(dict.fromkeys(id for id in origins if id is not None))
        linked.append(dataclasses.replace(span, record=dataclasses.replace(span.record, derived_from=found)))
    return tuple(linked)
