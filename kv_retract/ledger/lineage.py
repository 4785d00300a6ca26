"""What was derived from a span: quotes, tool calls made with its values, and the results of those calls (DESIGN D8).

A thread is read once, from its first message to its last, as the model did. What a retracted span says and nothing
else said before is evidence: where an answer repeats it, the answer has it from the span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..types import Cascade, Hop, Message, Retraction, RetractionRecord
from .derivation import AttentionOf, Reading, Taken
from .sources import Source, Sources

__all__ = ["AttentionOf", "Derived", "Lineage"]


class Derived(NamedTuple):
    """Proposals with what a cascade adds to them."""

    proposals: tuple[Retraction, ...]
    """Those that were given, then those that were derived from them."""
    hops: tuple[Hop, ...]
    """One for each derived span, nearest first; also for those that are proposed or retracted anyway."""


@dataclass(kw_only=True)
class Lineage:
    """Finds what was derived from retracted spans. Keeps nothing between calls.

    Derived are sentences of later assistant messages and whole tool calls that hold a value, a name or a run of words
    of the span; with `Cascade.LINEAGE` also the results of such calls, and what repeats a value that first came up in
    any of these. A value that stands elsewhere before (in a system or user message, in another result, in an answer
    that is no quote) is no evidence. Users and system prompts derive nothing, results only through their call.
    Reasoning is not read: no span can name it. Texts whose words are not apart, as Chinese, are compared by their
    values only.
    """

    min_characters: int = 4
    """Shortest identifier that is evidence."""
    min_digits: int = 3
    """Shortest number that is evidence, without the zeros at its ends: 105 is, 150 and 2000 are not."""
    min_words: int = 6
    """Shortest run of words that is evidence."""
    max_hops: int = 8
    """Longest way from the retracted span: 1 for a quote or call, 2 for the result of the call."""
    confidence_per_hop: float = 0.9
    """Each hop multiplies the confidence of the retraction by this."""
    attention: float | None = None
    """Share of its attention on a source from which a sentence or call counts as derived, where the engine tells.
    None: attention is not asked for. It tells what was looked at, not what was used: 0.5 finds 83 % of the answers
    that the bundled model derived from a span, and takes half of the sentences that merely name its subject."""

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        for name in ("min_characters", "min_digits", "min_words", "max_hops"):
            if getattr(self, name) < 1:
                raise ValueError(f"lineage: expected {name} of at least 1, got {getattr(self, name)!r}")
        for name in ("confidence_per_hop", "attention"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"lineage: expected {name} above 0 and at most 1, got {share!r}")

    def expand(
        self,
        proposals: Sequence[Retraction],
        messages: Sequence[Message],
        records: Sequence[RetractionRecord] = (),
        *,
        attention: AttentionOf | None = None,
    ) -> Derived:
        """Add to proposals what their cascades reach. Linear in the thread; nothing is read where none cascades.

        A cascade begins when a span is first taken back: not where a record covers a part of it, nor where one of its
        policy was revoked. Later messages may repeat a value for other reasons. Spans that are not in the messages
        are passed on as they are.

        Args:
            proposals: what policies found; `Retraction.cascade` says how far each reaches.
            messages: the thread, oldest first.
            records: retractions that stand in these messages, revoked ones too.
            attention: asked for each root and each derived result, if `Lineage.attention` is set.

        Returns:
            Derived proposals have policy, guarantee, scope and verify of the proposal that they were derived from, no
            notice, and no cascade of their own.
        """
        if all(p.cascade == Cascade.NONE for p in proposals):
            return Derived(tuple(proposals), ())
        taken = Taken(messages, records)
        # All of them are added, since whatever is taken back is no evidence.
        first = [p for p in dict.fromkeys(proposals) if taken.add(p)]
        roots = [p for p in first if p.cascade != Cascade.NONE]
        if not roots:
            return Derived(tuple(proposals), ())
        reading = Reading(
            messages,
            taken,
            Sources(min_characters=self.min_characters, min_digits=self.min_digits, min_words=self.min_words),
            roots,
            max_hops=self.max_hops,
            attention=attention if self.attention is not None else None,
            threshold=self.attention or 1.0,
        )
        found = sorted(reading.found(), key=lambda one: one.target.hops)
        derived = [
            self._proposal(one.target) for one in found if not taken.covers(one.target.span, one.target.root.guarantee)
        ]
        return Derived((*proposals, *derived), tuple(one.hop() for one in found))

    def _proposal(self, target: Source) -> Retraction:
        root = target.root
        return replace(
            root,
            span=target.span,
            reason=f"derived from a retracted span: {root.reason}",
            confidence=root.confidence * self.confidence_per_hop**target.hops,
            notice=None,
            cascade=Cascade.NONE,
            derived_from=(root.span,),
        )
