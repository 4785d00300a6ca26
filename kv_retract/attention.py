"""What the model looked at when it wrote a sentence or a call: attention of the engine, for the lineage of a span."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .cache.base import IntArray
from .engine.base import Engine, SupportsAttribution
from .errors import SpanError, UnsupportedError
from .ledger.lineage import AttentionOf, Lineage
from .ledger.sentences import sentences
from .thread import ThreadView
from .types import Interval, SpanRef

_ARGUMENT = re.compile(r'"((?:[^"\\]|\\.)*+)(?:"\s*+(:)?)?|([^\s{}\[\]:,"]++)', re.DOTALL)
"""A string of JSON, what stands behind it where it is a key, or a number or constant."""


def check_lineage(lineage: Lineage, engine: Engine) -> Lineage:
    """Return a lineage that the engine can serve.

    Raises:
        UnsupportedError: it asks for attention, and the engine does not show any.
    """
    if lineage.attention is not None and not isinstance(engine, SupportsAttribution):
        raise UnsupportedError(
            f"Lineage(attention={lineage.attention!r}) asks what the model looked at, which a {type(engine).__name__} "
            "does not tell; leave it None, or use the embedded engine"
        )
    return lineage


class Target(NamedTuple):
    """Something that an assistant message says or calls, in entries of the key."""

    ref: SpanRef
    entries: IntArray
    """All of it, ascending."""
    copied: IntArray
    """Those that may have been copied: of a call only the values of its arguments, since its form and its name are
    taken from any call before."""


@dataclass(frozen=True, eq=False)
class ThreadAttention:
    """Answers for one view of a thread, as `AttentionOf`: call it with a span.

    Targets are the sentences and the tool calls of the assistant messages behind the span's message, as far as they are
    cached and not retracted themselves; calls without arguments, and those that the template rewrites, are none. A
    target's share is that of its most attentive token, less that of its median token: what stands close before a
    target gets attention from all of its tokens, what is copied from far away gets it from a few. So a sentence of one
    token has no share.

    One call runs all targets through the model once. Nothing is prefilled for it: of a thread that is not cached it
    knows nothing.
    """

    engine: SupportsAttribution
    view: ThreadView

    def __call__(self, source: SpanRef) -> dict[SpanRef, float]:
        """Return the share of every target behind a span; empty where the span is not in the thread any more.

        Raises:
            UnsupportedError: the model does not show its attention.
        """
        span = self._interval(source)
        if span is None:
            return {}
        targets = [t for t in self._targets if t.ref.message > source.message and t.entries[0] >= span[1]]
        if not targets:
            return {}
        # With some tokenizers neighbours share a token.
        entries = np.unique(np.concatenate([t.entries for t in targets]))
        found = self.engine.attention(self.view.key, span, entries)
        if found is None:
            return {}
        share_of = np.zeros(len(self.view.key), np.float32)
        share_of[entries] = found.numpy()
        return {t.ref: max(0.0, float(share_of[t.copied].max() - np.median(share_of[t.entries]))) for t in targets}

    @cached_property
    def _targets(self) -> tuple[Target, ...]:
        """In the order of the messages."""
        return tuple(t for t in self._written() if t.entries[-1] < self.view.cached)

    def _written(self) -> Iterator[Target]:
        for index, message in enumerate(self.view.rendering.messages):
            if message.role != "assistant":
                continue
            for sentence in sentences(message.content):
                ref = SpanRef(index, start=sentence.start, end=sentence.end)
                yield from self._placed(ref, [ref])
            for number, call in enumerate(message.tool_calls):
                values = [SpanRef(index, "tool_call", number, *at) for at in _values(call.arguments)]
                yield from self._placed(SpanRef(index, "tool_call", number), values)

    def _placed(self, ref: SpanRef, copied: Sequence[SpanRef]) -> Iterator[Target]:
        """Yield a target, or nothing where it does not stand in the key, or none of what may be copied does."""
        at = self._interval(ref)
        parts = [np.arange(*part) for part in map(self._interval, copied) if part is not None]
        if at is not None and parts:
            yield Target(ref, np.arange(*at), np.concatenate(parts))

    def _interval(self, ref: SpanRef) -> Interval | None:
        """Return the entries of a span; None where the template does not show it, or some of it is retracted."""
        try:
            start, end = self.view.rendering.interval(ref)
        except SpanError:
            return None
        if any(e.start < end and start < e.end for e in self.view.edits):
            return None
        return self.view.entry(start), self.view.entry(end)


def _values(arguments: str) -> Iterator[Interval]:
    """Yield the characters of the values in a call's arguments, without quotes; malformed JSON as far as it goes."""
    for match in _ARGUMENT.finditer(arguments):
        start, end = match.span(1 if match[1] is not None else 3)
        if match[2] is None and start < end:
            yield start, end


def attention_of(engine: Engine, view: ThreadView) -> AttentionOf | None:
    """Return what answers for a view of a thread; None where the engine does not show attention.

    Valid as long as the view.
    """
    return ThreadAttention(engine, view) if isinstance(engine, SupportsAttribution) else None
