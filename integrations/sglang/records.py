"""The server's ledger of span retractions: what was taken back in which thread, never the text itself.

A thread is a namespace, and a span is found again by the digest of the original tokens up to its end: it applies to
whatever request of the namespace begins with them. So clients may go on sending the original text. With a file, the
ledger survives a restart; with several tensor-parallel ranks, the first one writes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

import numpy as np

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.errors import LedgerError

from .api import State
from .refusal import Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord:
    """One span that was taken back."""

    retraction_id: str
    extra_key: str
    start: int
    end: int
    """In tokens of the original text."""
    digest: str
    """Of the original tokens `[0, end)`; see `digests`."""
    state: State
    eraser: str
    eraser_id: str
    shared: bool
    """Whether the tombstones are the same in every thread that begins alike."""
    policy: str = ""
    reason: str = ""
    created_at: str = ""


class SpanLedger:
    """Keeps span records in memory, and in an SQLite file where one is named.

    Args:
        path: of the file; empty: memory only.
        writes: whether changes go to the file; False on all ranks but the first.

    Raises:
        LedgerError: the file is no such ledger.
    """

    def __init__(self, path: str = "", *, writes: bool = True) -> None:
        self._records: dict[str, dict[str, SpanRecord]] = {}
        self._writes, self._file = writes, None
        if path:
            try:
                self._file = sqlite3.connect(path, check_same_thread=False)
                self._file.execute("PRAGMA journal_mode=WAL")
                self._file.execute(
                    "CREATE TABLE IF NOT EXISTS span_retractions (retraction_id TEXT PRIMARY KEY, record TEXT NOT NULL)"
                )
                rows = self._file.execute("SELECT record FROM span_retractions ORDER BY rowid").fetchall()
                self._keep(SpanRecord(**json.loads(text)) for (text,) in rows)
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise LedgerError(f"cannot read span retractions from {path!r}: {error}; name another file") from error

    def records(self, extra_key: str | None) -> list[SpanRecord]:
        """Return the records of a thread in the order in which they were made."""
        return list(self._records.get(extra_key or "", {}).values())

    def threads(self) -> int:
        """Return how many threads have records."""
        return len(self._records)

    def put(self, records: Sequence[SpanRecord]) -> None:
        """Add records, or replace those of the same id; all or none.

        Raises:
            LedgerError: the file cannot be written; nothing has changed.
        """
        if self._file is not None and self._writes and records:
            try:
                with self._file:
                    self._file.executemany(
                        "INSERT INTO span_retractions VALUES (?, ?) "
                        "ON CONFLICT (retraction_id) DO UPDATE SET record = excluded.record",
                        [(r.retraction_id, json.dumps(asdict(r))) for r in records],
                    )
            except sqlite3.Error as error:
                raise LedgerError(f"cannot write the ledger of span retractions: {error}") from error
        self._keep(records)

    def set_state(self, records: Sequence[SpanRecord], state: State) -> None:
        """Change the state of records; raises as `put`."""
        self.put([replace(record, state=state) for record in records if record.state != state])

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep(self, records: Iterable[SpanRecord]) -> None:
        for record in records:
            self._records.setdefault(record.extra_key, {})[record.retraction_id] = record


def digests(ids: IntArray, ends: Iterable[int]) -> dict[int, str]:
    """Return the digest of `ids[:end]` for some ends; those past the ids are left out."""
    found, state, at = {}, sha256(), 0
    data = np.ascontiguousarray(ids, dtype=np.int64)
    for end in sorted(set(ends)):
        if end > len(data):
            break
        state.update(data[at:end].tobytes())
        found[end], at = state.hexdigest(), end
    return found


def standing(records: Sequence[SpanRecord], ids: IntArray) -> list[SpanRecord]:
    """Return the records that apply to original tokens and are not revoked, in token order."""
    alive = [record for record in records if record.state != "revoked"]
    found = digests(ids, (record.end for record in alive))
    return sorted((r for r in alive if found.get(r.end) == r.digest), key=lambda record: record.start)


def new_records(
    ids: IntArray, spans: Sequence[tuple[int, int]], known: Sequence[SpanRecord], template: SpanRecord
) -> list[SpanRecord]:
    """Return records for spans of original tokens; one that stands already is returned as it is.

    Args:
        ids: the thread as its clients send it. Shape: (num_tokens,)
        spans: intervals of it.
        known: what stands in it.
        template: everything but id, interval and digest.

    Raises:
        Refused: a span lies outside of the thread, or overlaps another one.
    """
    taken = {(record.start, record.end): record for record in known}
    made: list[SpanRecord] = []
    found = digests(ids, (end for _, end in spans))
    for start, end in sorted(spans):
        if end > len(ids):
            raise Refused("bad_request", f"span [{start}, {end}) lies outside of a thread of {len(ids)} tokens")
        if (start, end) in taken:
            made.append(taken[start, end])
            continue
        others = [*taken, *((record.start, record.end) for record in made)]
        if clash := next((other for other in others if other[0] < end and start < other[1]), None):
            raise Refused("overlaps", f"span [{start}, {end}) overlaps [{clash[0]}, {clash[1]}), which was taken back")
        identity = sha256(f"{template.extra_key}\0{start}\0{found[end]}".encode()).hexdigest()[:16]
        made.append(replace(template, retraction_id=identity, start=start, end=end, digest=found[end]))
    return made


def key_of(ids: IntArray, records: Sequence[SpanRecord], exact: Iterable[str] = ()) -> ThreadKey:
    """Return what is asked of the cache for original tokens: tombstones in place of steered spans, exact ones left out.

    Args:
        ids: original tokens.
        records: what stands in them, in token order.
        exact: ids of records that are left out as well.
    """
    exact = set(exact)
    edits = [
        KeyEdit(
            start=r.start, end=r.end, exact=r.state == "exact" or r.retraction_id in exact, eraser_id=r.eraser_id,
            retraction_id=r.retraction_id, shared=r.shared,
        )
        for r in records
    ]  # fmt: skip
    return build_key(ids, edits, extra_key=records[0].extra_key if records else "")


def entry_of(token: int, records: Sequence[SpanRecord], exact: Iterable[str] = ()) -> int:
    """Return the entry of the key that a token of the original text became."""
    left_out = set(exact) | {r.retraction_id for r in records if r.state == "exact"}
    return token - sum(min(r.end, token) - r.start for r in records if r.retraction_id in left_out and r.start < token)
