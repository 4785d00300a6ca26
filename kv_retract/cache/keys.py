"""Tombstones: what stands in the radix key where a retracted span stood (DESIGN D2).

A tombstone id is negative, so it is outside of every vocabulary, can be recognised when it is cold, and must never
reach an embedding. It is derived from the span's token ids, the eraser and the retraction, so the original text can
no longer match and two threads never share a suffix that was computed under different spans. Where what an eraser
writes depends on nothing behind the span, the retraction is left out, and threads with the same beginning share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import SpanError
from .base import IntArray, ThreadKey

_BITS = 62


def tombstone_ids(span_ids: IntArray, eraser_id: str, retraction_id: str) -> IntArray:
    """Return one tombstone id per token of the span. Shape: (len(span_ids),), int64, all negative.

    Deterministic, so that a restarted process or another replica names the same edit by the same key.
    """
    digest = hashlib.sha256(np.ascontiguousarray(span_ids, dtype=np.int64).tobytes())
    digest.update(f"\0{eraser_id}\0{retraction_id}".encode())
    base = int.from_bytes(digest.digest()[:8], "big") >> (64 - _BITS)
    offsets = np.arange(len(span_ids), dtype=np.int64)
    return -1 - ((base + offsets) & ((1 << _BITS) - 1))


def is_tombstone(ids: IntArray) -> NDArray[np.bool_]:
    """Return a boolean mask of the tombstones in `ids`. Shape: ids.shape."""
    return ids < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEdit:
    """One retracted span of a thread, as its key shows it."""

    start: int
    end: int
    exact: bool
    """Left out of the key; else tombstones stand in its place."""
    eraser_id: str = ""
    retraction_id: str = ""
    closes_gap: bool = False
    """Whether what follows moved up by the span's length."""
    shared: bool = False
    """Whether the tombstones are the same in every thread that has the span there: the edit is shared."""


def build_key(ids: IntArray, edits: Sequence[KeyEdit], *, extra_key: str = "") -> ThreadKey:
    """Apply retractions to a rendered thread: the only way from text to what an engine is asked for.

    Args:
        ids: the thread as rendered. Shape: (num_tokens,)
        edits: in token order, not overlapping.
        extra_key: namespace of the key.

    Raises:
        SpanError: edits overlap, are out of order, or lie outside of the thread.
    """
    ids = np.asarray(ids, dtype=np.int64)
    parts, positions = [], []
    at, position = 0, 0
    for edit in edits:
        if not at <= edit.start < edit.end <= len(ids):
            raise SpanError(
                f"retraction {edit.retraction_id!r} at [{edit.start}, {edit.end}) does not follow token {at} of a "
                f"thread of {len(ids)} tokens; spans must be ordered, apart and inside of the thread"
            )
        parts.append(ids[at : edit.start])
        positions.append(position + np.arange(edit.start - at))
        position += edit.start - at
        if not edit.exact:
            length = edit.end - edit.start
            retraction_id = "" if edit.shared else edit.retraction_id
            parts.append(tombstone_ids(ids[edit.start : edit.end], edit.eraser_id, retraction_id))
            positions.append(np.full(length, position - 1) if edit.closes_gap else position + np.arange(length))
            position += 0 if edit.closes_gap else length
        at = edit.end
    parts.append(ids[at:])
    positions.append(position + np.arange(len(ids) - at))
    return ThreadKey(
        ids=np.concatenate(parts).astype(np.int64),
        positions=np.concatenate(positions).astype(np.int64),
        extra_key=extra_key,
    )
