"""What was derived from a span: quotes, tool calls made with its values, and the results of those calls (DESIGN D8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ..types import Hop, Message, Retraction, RetractionRecord, SpanRef

AttentionOf: TypeAlias = Callable[[SpanRef], Mapping[SpanRef, float]]
"""`source -> {sentence of a later assistant message, or tool call: share of its attention that lies on the source}`."""


class Derived(NamedTuple):
    """Proposals with what a cascade adds to them."""

    proposals: tuple[Retraction, ...]
    """Those that were given, then those that were derived from them."""
    hops: tuple[Hop, ...]
    """One for each derived proposal, nearest first."""


@dataclass(kw_only=True)
class Lineage:
    """Finds what was derived from retracted spans."""

    def expand(
        self,
        proposals: Sequence[Retraction],
        messages: Sequence[Message],
        records: Sequence[RetractionRecord] = (),
        *,
        attention: AttentionOf | None = None,
    ) -> Derived:
        """Add to proposals what their cascades reach."""
        return Derived(tuple(proposals), ())
