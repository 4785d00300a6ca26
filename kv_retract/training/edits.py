"""Threads with spans to be erased, and what is read and asked afterwards, as token ids: what erasers learn from."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from ..types import Interval
from .encoding import IntArray, RowEncoder, answer_without
from .samples import CorpusSample, Probe

QueryKind = Literal["affected", "unaffected", "neighbor", "continuation"]


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Tokens that are read after an edit; queries do not see each other."""

    kind: QueryKind
    ids: IntArray
    """Shape: (num_tokens,)"""
    first: int
    """The first token to be predicted, at least 1; all that follow are as well."""
    sees: int
    """How much of the thread stands before it: its length, or less where a neighbor of a span is predicted."""
    lost: IntArray | None = None
    """What stood in place of `ids[first:]` as long as the span was there; affected ones only."""


@dataclass(frozen=True, slots=True, eq=False)
class EditRow:
    """One thread, its spans that are erased together, and what is asked afterwards."""

    thread: IntArray
    """Shape: (num_tokens,)"""
    spans: tuple[Interval, ...]
    """In order, not overlapping."""
    queries: tuple[Query, ...]

    @property
    def span_index(self) -> IntArray:
        """Thread tokens inside of spans. Shape: (num_span_tokens,)."""
        return np.concatenate([np.arange(start, end) for start, end in self.spans])

    def without_spans(self) -> IntArray:
        """Return the thread that never had the spans."""
        return np.delete(self.thread, self.span_index)

    def sees_without_spans(self, query: Query) -> int:
        """Return how much of that thread stands before a query."""
        return query.sees - sum(min(end, query.sees) - start for start, end in self.spans if start < query.sees)


def edit_of_sample(
    encoder: RowEncoder, sample: CorpusSample, probes: Sequence[Probe], span_ids: Set[str], *, with_tools: bool = True
) -> EditRow:
    """Return a sample of the corpus with some of its spans to be erased.

    Args:
        encoder: of the model's tokenizer.
        sample: the thread.
        probes: what is asked; each is affected by at most one of the spans.
        span_ids: which spans.
        with_tools: whether the tools are listed in the first turn.
    """
    thread, tokens_of = encoder.thread(sample, with_tools=with_tools)
    queries = []
    for probe in probes:
        asked, told = encoder.probe(probe.question, answer_without(probe, span_ids))
        affected = bool(span_ids & set(probe.without))
        lost = encoder.probe(probe.question, probe.answer)[1] if affected else None
        kind: QueryKind = "affected" if affected else "unaffected"
        queries.append(Query(kind, np.concatenate([asked, told]), len(asked), len(thread), lost))
    spans = sorted(tokens_of(sample.span(span_id).ref) for span_id in span_ids)
    return EditRow(thread, tuple(spans), tuple(queries))


def log_uniform(most: int, rng: random.Random) -> int:
    """Draw a number from 1 to `most`, each power of two about as likely as the next: few as likely as many."""
    return min(most, int(math.exp(rng.uniform(0, math.log(most + 1)))))


def edit_of_text(
    text: IntArray,
    rng: random.Random,
    *,
    marks: Collection[int] = (),
    turn_share: float = 0.5,
    most_spans: int = 3,
    longest: int = 512,
    ahead: int = 48,
) -> EditRow:
    """Return a text with spans to be erased: span-neighbor pre-training (arXiv 2606.17034).

    The last tokens of the text are its continuation, and the tokens behind each span its neighbors. A span is a random
    piece or, where the text has marks, sometimes all that stands between two of them: a turn, a tool result.

    Args:
        text: token ids; at least 3 * `ahead` of them.
        rng: where chance comes from.
        marks: tokens that begin and end turns and their parts (`RowEncoder.marks`).
        turn_share: how often what stands between marks is drawn.
        most_spans: spans at most.
        longest: tokens of a span at most; random pieces are an eighth of the text at most, others a third.
        ahead: tokens of the continuation, and of neighbors at most.

    Raises:
        ValueError: the text is too short.
    """
    if ahead < 4:
        raise ValueError(f"expected at least 4 tokens ahead, got {ahead}")
    if len(text) < 3 * ahead:
        raise ValueError(f"expected a text of at least {3 * ahead} tokens, got {len(text)}")
    thread, continuation = text[:-ahead], text[-ahead - 1 :]
    parts = _between(thread[:-2], marks, longest=min(longest, len(thread) // 3))
    spans: list[Interval] = []
    for _ in range(log_uniform(most_spans, rng)):
        length = log_uniform(min(longest, max(1, len(thread) // 8)), rng)
        start = rng.randrange(len(thread) - length - 2)
        if parts and turn_share and rng.random() < turn_share:
            start, end = rng.choice(parts)
            length = end - start
        if all(start + length < a or b < start for a, b in spans):
            spans.append((start, start + length))
    spans.sort()
    queries = [Query("continuation", continuation, 1, len(thread) - 1)]
    for number, (_, end) in enumerate(spans):
        stop = min(end + ahead, *(a for a, _ in spans[number + 1 :]), len(thread))
        if stop - end > 1:
            queries.append(Query("neighbor", thread[end:stop], 1, end))
    return EditRow(thread, tuple(spans), tuple(queries))


def _between(text: IntArray, marks: Collection[int], *, longest: int) -> list[Interval]:
    """Return what stands between one mark and the next, where that is 4 to `longest` tokens."""
    at = np.flatnonzero(np.isin(text, list(marks)))
    return [(int(a) + 1, int(b)) for a, b in pairwise(at) if 4 <= b - a - 1 <= longest]
