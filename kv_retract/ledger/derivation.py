"""One reading of a thread, from its first message to its last, that follows what retracted spans said."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..errors import SpanError
from ..spans import MessagePart, check_span, extent, overlap, part_of, subtract
from ..types import (
    Cascade,
    Evidence,
    Guarantee,
    Hop,
    Interval,
    Message,
    Retraction,
    RetractionRecord,
    SpanRef,
    Status,
)
from .sentences import sentences
from .sources import Clue, Source, Sources
from .views import blank, view

AttentionOf: TypeAlias = Callable[[SpanRef], Mapping[SpanRef, float]]
"""`source -> {sentence of a later assistant message, or tool call: share of its attention that lies on the source}`."""

_MOST_EVIDENCE = 16
"""Of one hop, strongest first: plans are logged."""


class Taken:
    """What is taken back anyway, by records and by proposals.

    Args:
        messages: the thread.
        records: those that stand in it, revoked ones too.
    """

    def __init__(self, messages: Sequence[Message], records: Iterable[RetractionRecord]) -> None:
        self._messages = messages
        self._records: defaultdict[MessagePart, list[RetractionRecord]] = defaultdict(list)
        self._taken: defaultdict[MessagePart, list[tuple[Interval, Guarantee]]] = defaultdict(list)
        for record in records:
            if self._is_there(record.span):
                self._records[part_of(record.span)].append(record)
                if record.status is not Status.REVOKED:
                    self._take(record.span, record.guarantee)

    def add(self, proposal: Retraction) -> bool:
        """Add a proposal, unless the planner will leave it out; return whether a cascade may begin with it."""
        span = proposal.span
        if not self._is_there(span):
            return False
        touched = [record for record in self._records.get(part_of(span), ()) if overlap(record.span, span)]
        policies = set(proposal.policy.split("+")) - {"explicit"}
        if any(r.status is Status.REVOKED and policies.intersection(r.policy.split("+")) for r in touched):
            return False
        self._take(span, proposal.guarantee)
        return all(record.status is Status.REVOKED for record in touched)

    def intervals(self, place: MessagePart) -> list[Interval]:
        """Return the characters of a part that are taken back."""
        return [interval for interval, _ in self._taken.get(place, ())]

    def covers(self, span: SpanRef, guarantee: Guarantee) -> bool:
        """Whether all of a span is taken back, under a guarantee that is no weaker."""
        taken = [i for i, own in self._taken.get(part_of(span), ()) if own.stronger(guarantee) is own]
        return not subtract(extent(span, self._messages), taken)

    def _take(self, span: SpanRef, guarantee: Guarantee) -> None:
        self._taken[part_of(span)].append((extent(span, self._messages), guarantee))

    def _is_there(self, span: SpanRef) -> bool:
        try:
            check_span(span, self._messages)
        except SpanError:
            return False
        start, end = extent(span, self._messages)
        return start < end


@dataclass(slots=True)
class Found:
    """A span that was derived; neighbouring sentences grow together."""

    source: Source
    target: Source
    last: int = 0
    """Number of its last sentence."""
    evidence: dict[Evidence, None] = field(default_factory=dict)

    def grow(self, number: int, end: int, evidence: Iterable[Evidence]) -> None:
        """Add a sentence, or what there is in a call."""
        self.last = number
        if self.target.span.end is not None:
            self.target.span = replace(self.target.span, end=end)
        self.evidence.update(dict.fromkeys(evidence))

    def hop(self) -> Hop:
        """Return the hop to it."""
        span = self.target.span
        strongest = sorted(self.evidence, key=lambda e: e.weight, reverse=True)[:_MOST_EVIDENCE]
        return Hop(
            kind="result" if strongest[0].kind == "call_id" else "call" if span.part == "tool_call" else "quote",
            source=self.source.span,
            target=span,
            evidence=tuple(strongest),
        )


class Reading:
    """Goes once through one thread.

    Args:
        messages: the thread.
        taken: what is taken back anyway.
        sources: empty; says what counts as evidence.
        roots: proposals with which a cascade begins.
        max_hops: longest way from a root.
        attention: asked for each root and each derived result; None: for none.
        threshold: share of attention from which something counts as derived.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        taken: Taken,
        sources: Sources,
        roots: Iterable[Retraction],
        *,
        max_hops: int,
        attention: AttentionOf | None,
        threshold: float,
    ) -> None:
        self._messages, self._taken, self._sources, self._max_hops = messages, taken, sources, max_hops
        self._attention, self._threshold = attention, threshold
        self._attended: defaultdict[MessagePart, list[tuple[Source, SpanRef, float]]] = defaultdict(list)
        self._roots: defaultdict[MessagePart, list[Source]] = defaultdict(list)
        for root in roots:
            self._roots[part_of(root.span)].append(Source(root.span, root, 0))
        self._found: list[Found] = []
        # The newest call with an id, as some threads use one twice; calls without a result yet; what each was made
        # from, where its result is derived.
        self._by_id: dict[str, MessagePart] = {}
        self._open: dict[MessagePart, None] = {}
        self._made: dict[MessagePart, list[Source]] = {}

    def found(self) -> list[Found]:
        """Read the thread; return what was derived, in order."""
        for index, message in enumerate(self._messages):
            if message.role == "assistant":
                self._answer((index, "content", 0), message.content)
                self._open = {}
                for number, call in enumerate(message.tool_calls):
                    place: MessagePart = (index, "tool_call", number)
                    derived = self._answer(place, call.arguments)
                    self._made[place] = [s for s in (*self._roots.get(place, ()), *derived) if _goes_on(s)]
                    self._by_id[call.id] = place
                    self._open[place] = None
            else:
                results = self._results(index, message) if message.role == "tool" and message.content else []
                self._told((index, "content", 0), message.content, results)
        return self._found

    def _results(self, index: int, message: Message) -> list[Source]:
        """Return one source for each root that the call of a result was made from."""
        call = self._by_id.get(message.tool_call_id) if message.tool_call_id else next(iter(self._open), None)
        if call is None:
            return []
        self._open.pop(call, None)
        results = []
        for source in self._made[call]:
            if source.hops < self._max_hops:
                result = Source(SpanRef(index), source.root, source.hops + 1)
                where = SpanRef(call[0], "tool_call", call[2])
                evidence = Evidence(kind="call_id", source=where, target=result.span, weight=1.0)
                self._found.append(Found(source, result, evidence={evidence: None}))
                results.append(result)
        return results

    def _told(self, place: MessagePart, text: str, results: Sequence[Source]) -> None:
        """Read what no model wrote."""
        shown = view(text)
        if not results:
            self._sources.stand(blank(shown, self._taken.intervals(place)), answer=False)
        self._begin_roots(place, shown)
        if results:
            self._begin(results, shown)

    def _answer(self, place: MessagePart, text: str) -> list[Source]:
        """Read what a model wrote, content or arguments of a call; return what of it was derived."""
        shown = view(text)
        derived = self._derived(place, text, shown)
        gone = [*self._taken.intervals(place), *(extent(one.span, self._messages) for one in derived)]
        self._sources.stand(blank(shown, gone), answer=True)
        self._begin_roots(place, shown)
        return derived

    def _derived(self, place: MessagePart, text: str, shown: str) -> list[Source]:
        values = list(self._sources.values(shown))
        clues = [*self._sources.name_clues(shown), *self._sources.word_clues(shown), *self._attention_on(place)]
        if not clues and next(self._sources.value_clues(values), None) is None:
            return []
        # What is taken back as a whole.
        units: list[Interval] = [(-1, len(text))] if place[1] == "tool_call" else list(sentences(text))
        by_unit: defaultdict[int, list[Clue]] = defaultdict(list)
        for clue in clues:
            first = max(0, bisect_left(units, (clue.start, sys.maxsize)) - 1)
            for number in range(first, bisect_left(units, (clue.end,))):
                if units[number][1] > clue.start:
                    by_unit[number].append(clue)
        starts = [value.start for value in values]
        left = set(self._sources.values(blank(shown, self._taken.intervals(place))))
        found: list[Found] = []
        newest: dict[Source, Found] = {}
        for number, (start, end) in enumerate(units):
            own = values[bisect_left(starts, start) : bisect_left(starts, end)]
            near = _nearest([*by_unit[number], *self._sources.value_clues(own)], self._max_hops)
            for source, why in near.items():
                one = newest.get(source)
                if one is None or one.last != number - 1:
                    target = Source(_span(place, (start, end)), source.root, source.hops + 1)
                    one = newest[source] = Found(source, target)
                    found.append(one)
                one.grow(number, end, [_evidence(place, clue) for clue in why])
            if near:
                self._sources.add_new([newest[source].target for source in near if _goes_on(source)], own)
            else:
                # Before the rest of the part is read: what a later sentence repeats from here is not new there.
                self._sources.stand_values(value for value in own if value in left)
        self._found += found
        return [one.target for one in found]

    def _begin_roots(self, place: MessagePart, shown: str) -> None:
        for root in self._roots.get(place, ()):
            self._begin([root], shown)

    def _begin(self, sources: Sequence[Source], shown: str) -> None:
        """Note what a root says, or a result with its roots."""
        span = sources[0].span
        self._sources.add(sources, shown, extent(span, self._messages))
        if self._attention is None:
            return
        for target, share in self._attention(span).items():
            if share >= self._threshold:
                self._attended[part_of(target)] += [(source, target, share) for source in sources]

    def _attention_on(self, place: MessagePart) -> Iterator[Clue]:
        for source, target, share in self._attended.get(place, ()):
            start, end = extent(target, self._messages)
            yield Clue(start, end, "attention", share, source, extent(source.span, self._messages))


def _nearest(clues: Iterable[Clue], max_hops: int) -> dict[Source, list[Clue]]:
    """Return the clues by source; of the sources of one root only the nearest, of these that with the most."""
    by_source: defaultdict[Source, list[Clue]] = defaultdict(list)
    for clue in clues:
        by_source[clue.source].append(clue)
    order = sorted(by_source, key=lambda source: (source.hops, -len(by_source[source])))
    nearest: dict[int, Source] = {}
    for source in order:
        nearest.setdefault(id(source.root), source)
    return {source: by_source[source] for source in nearest.values() if source.hops < max_hops}


def _goes_on(source: Source) -> bool:
    return source.root.cascade == Cascade.LINEAGE


def _evidence(place: MessagePart, clue: Clue) -> Evidence:
    source, target = _span(part_of(clue.source.span), clue.at), _span(place, (clue.start, clue.end))
    return Evidence(kind=clue.kind, source=source, target=target, weight=float(clue.weight))


def _span(place: MessagePart, characters: Interval) -> SpanRef:
    """Return the span with these characters."""
    start, end = characters
    return SpanRef(*place) if start < 0 else SpanRef(*place, start, end)
