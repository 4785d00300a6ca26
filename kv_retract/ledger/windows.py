"""Where a retraction applies: its window, the messages from the span's on, must stand in the thread (DESIGN D3)."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import SpanError
from ..types import Guarantee, Message, Retraction, RetractionRecord, Scope, SpanRef, Status, window_digest

Window = tuple[int, str]
"""(window_size, window_digest)"""


def applicable(records: Sequence[RetractionRecord], messages: Sequence[Message]) -> tuple[RetractionRecord, ...]:
    """Return the records that apply to `messages`: those that stand in them and are not revoked. See `standing`."""
    return standing([r for r in records if r.status is not Status.REVOKED], messages)


def standing(records: Sequence[RetractionRecord], messages: Sequence[Message]) -> tuple[RetractionRecord, ...]:
    """Return the records whose window stands in `messages`, revoked ones too.

    A window may stand in several places, where messages repeat each other. A record of scope `THREAD` applies to all of
    them, once for each. One of scope `BRANCH` keeps the place at which it was made, else it takes the nearest one;
    records made at different messages take different places while there are enough, so that none of two equal messages
    comes back when older ones are pruned.

    Returns:
        The records with `span.message` set to where they stand now, in order of (message, part, call, start).
    """
    if not records:
        return ()
    digests = [m.digest() for m in messages]
    everywhere = [r for r in records if r.scope is Scope.THREAD]
    placed = [*_everywhere(everywhere, digests), *_once([r for r in records if r.scope is Scope.BRANCH], digests)]
    return tuple(sorted(placed, key=lambda r: (r.span.message, r.span.part, r.span.call, r.span.start)))


def _everywhere(records: Sequence[RetractionRecord], digests: Sequence[str]) -> list[RetractionRecord]:
    """Place records of one message at every message that equals it.

    Of two for one span the one made there stays; what is revoked and what is not stand beside each other.
    """
    if not records:
        return []
    places: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        places[window_digest([digest])].append(index)
    placed: dict[tuple[SpanRef, bool], RetractionRecord] = {}
    for r in records:
        for index in places.get(r.window_digest, ()):
            span = replace(r.span, message=index)
            key = (span, r.status is Status.REVOKED)
            if span == r.span or key not in placed:
                placed[key] = replace(r, span=span)
    return list(placed.values())


def _once(records: Sequence[RetractionRecord], digests: Sequence[str]) -> list[RetractionRecord]:
    wanted: dict[Window, set[int]] = defaultdict(set)
    for r in records:
        wanted[r.window_size, r.window_digest].add(r.span.message)
    moved = {window: at for window, at in wanted.items() if not _all_in_place(window, at, digests)}
    found = _scan(digests, moved)
    places: dict[tuple[Window, int], int] = {}
    for window, indices in wanted.items():
        if window not in moved:
            places.update({(window, i): i for i in indices})
        elif window in found:
            places.update({(window, i): at for i, at in _assign(indices, found[window]).items()})
    return [
        replace(r, span=replace(r.span, message=places[(r.window_size, r.window_digest), r.span.message]))
        for r in records
        if ((r.window_size, r.window_digest), r.span.message) in places
    ]


def record_for(
    retraction: Retraction,
    messages: Sequence[Message],
    *,
    thread_id: str,
    eraser_id: str,
    closes_gap: bool,
    shared: bool,
    exact: bool,
    now: str,
    span_tokens: int,
) -> RetractionRecord:
    """Build the record of a retraction that is about to be made.

    Args:
        retraction: what was decided; a scope of None becomes `THREAD` for exact guarantees, else `BRANCH`.
        messages: the thread at this moment.
        thread_id: its label, part of `retraction_id`.
        eraser_id: see `RetractionRecord`.
        closes_gap: see `RetractionRecord`.
        shared: see `RetractionRecord`.
        exact: whether the suffix is recomputed at once.
        now: ISO 8601, UTC.
        span_tokens: length of the span in tokens.

    Raises:
        SpanError: the span's message does not exist.
    """
    span = retraction.span
    if not 0 <= span.message < len(messages):
        raise SpanError(f"expected a message from 0 to {len(messages) - 1}, got {span.message!r}")
    scope = retraction.scope or (Scope.THREAD if retraction.guarantee is Guarantee.EXACT else Scope.BRANCH)
    size = 1 if scope is Scope.THREAD else len(messages) - span.message
    digest = window_digest([m.digest() for m in messages[span.message : span.message + size]])
    # The index is part of the identity: of two equal messages, each has a retraction of its own. So are policy,
    # guarantee and scope: what was undone and is taken back for another reason is another retraction.
    identity = [thread_id, digest, span.message, span.part, span.call, span.start, span.end]
    identity += [retraction.policy, retraction.guarantee, scope]
    return RetractionRecord(
        retraction_id=hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        span=span,
        window_size=size,
        window_digest=digest,
        policy=retraction.policy,
        reason=retraction.reason,
        guarantee=retraction.guarantee,
        scope=scope,
        status=Status.EXACT if exact else Status.STEERED,
        eraser_id=eraser_id,
        closes_gap=closes_gap,
        shared=shared,
        notice=retraction.notice,
        created_at=now,
        span_tokens=span_tokens,
    )


def _all_in_place(window: Window, indices: Iterable[int], digests: Sequence[str]) -> bool:
    size, digest = window
    return all(0 <= i <= len(digests) - size and window_digest(digests[i : i + size]) == digest for i in indices)


def _scan(digests: Sequence[str], windows: Iterable[Window]) -> dict[Window, list[int]]:
    """Find every place of each window; one pass from each message serves the windows of all sizes."""
    sizes: dict[int, set[str]] = defaultdict(set)
    for size, digest in windows:
        sizes[size].add(digest)
    longest = max(sizes, default=0)
    found: dict[Window, list[int]] = defaultdict(list)
    parts = [f'"{digest}"'.encode() for digest in digests]
    for start in range(len(parts)):
        # As `window_digest` of types.py, for growing windows.
        state = hashlib.sha256(b"[")
        for size, part in enumerate(parts[start : start + longest], start=1):
            state.update(part if size == 1 else b"," + part)
            if size in sizes:
                closed = state.copy()
                closed.update(b"]")
                digest = closed.hexdigest()
                if digest in sizes[size]:
                    found[size, digest].append(start)
    return found


def _assign(indices: Iterable[int], places: Sequence[int]) -> dict[int, int]:
    """Give each recorded index the nearest place, later ones first, no place twice while others are free."""
    free = list(places)
    assigned = {i: i for i in indices if i in places}
    free = [p for p in free if p not in assigned]
    for i in sorted(set(indices) - set(assigned), reverse=True):
        # With too few places one is shared: rather retract too much than show a retracted text again.
        assigned[i] = min(free or places, key=lambda place: (abs(place - i), place))
        if assigned[i] in free:
            free.remove(assigned[i])
    return assigned
