"""The server's ledger of span retractions: what was taken back in which thread, never the text itself.

A thread is a namespace, and a span is found again by the digest of the original tokens up to its end: it applies to
whatever request of the namespace begins with them. So clients may go on sending the original text. With a file, the
ledger survives a restart. Replicas of a server exchange what changed (`peers`): every ledger numbers its changes, and a
record counts its decisions, so that the newest one wins.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from uuid import uuid4

import numpy as np

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.errors import LedgerError

from .api import State
from .refusal import Refused

log = logging.getLogger(__name__)


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
    revision: int = 1
    """How often it was decided on: taken back, undone, healed. A steered span that became exact because its cache was
    gone is no decision."""

    def wins_over(self, other: SpanRecord | None) -> bool:
        """Whether a replica that has `other` takes this one instead; of two decisions alike, the text stays out."""
        if other is None or self.revision != other.revision:
            return other is None or self.revision > other.revision
        return other.state == "revoked" != self.state


class SpanLedger:
    """Keeps span records in memory, and in an SQLite file where one is named.

    Args:
        path: of the file; empty: memory only.

    Raises:
        LedgerError: the file is no such ledger.
    """

    def __init__(self, path: str = "") -> None:
        self._records: dict[str, dict[str, SpanRecord]] = {}
        self._changed: dict[str, int] = {}
        """Id of a record to the number of its last change."""
        self.sequence = 0
        """Number of the last change."""
        self.ledger_id, self._file = uuid4().hex, None
        if path:
            try:
                self._file = sqlite3.connect(path, check_same_thread=False)
                self._read(self._file)
            except (sqlite3.Error, ValueError, TypeError) as error:
                raise LedgerError(f"cannot read span retractions from {path!r}: {error}; name another file") from error

    def records(self, extra_key: str | None) -> list[SpanRecord]:
        """Return the records of a thread in the order in which they were made."""
        return list(self._records.get(extra_key or "", {}).values())

    def threads(self) -> int:
        """Return how many threads have records."""
        return len(self._records)

    def changes(self, after: int = 0) -> list[SpanRecord]:
        """Return the records that changed after change number `after`, of all threads."""
        return [
            record
            for records in self._records.values()
            for record in records.values()
            if self._changed[record.retraction_id] > after
        ]

    def put(self, records: Sequence[SpanRecord], *, must_last: bool = True) -> None:
        """Add records, or replace those of the same id; all or none.

        Args:
            records: of any threads.
            must_last: False: where the file cannot be written, the change holds until the server ends.

        Raises:
            LedgerError: the file cannot be written; nothing has changed.
        """
        numbered = list(enumerate(records, start=self.sequence + 1))
        if self._file is not None and records:
            try:
                with self._file:
                    self._file.executemany(
                        "INSERT INTO span_retractions (retraction_id, record, sequence) VALUES (?, ?, ?) ON CONFLICT "
                        "(retraction_id) DO UPDATE SET record = excluded.record, sequence = excluded.sequence",
                        [(r.retraction_id, json.dumps(asdict(r)), number) for number, r in numbered],
                    )
            except sqlite3.Error as error:
                if must_last:
                    raise LedgerError(f"cannot write the ledger of span retractions: {error}") from error
                log.error("kv_retract: cannot write the ledger of span retractions: %s", error)
        for number, record in numbered:
            self._keep(record, number)

    def decide(self, records: Sequence[SpanRecord], state: State) -> None:
        """Change the state of records by a decision; raises as `put`."""
        self.put([replace(r, state=state, revision=r.revision + 1) for r in records if r.state != state])

    def set_state(self, records: Sequence[SpanRecord], state: State, *, must_last: bool = True) -> None:
        """Change the state of records as this server's cache has it; see `put`."""
        self.put([replace(record, state=state) for record in records if record.state != state], must_last=must_last)

    def again(self, record: SpanRecord, adopted: Container[str] = ()) -> SpanRecord:
        """Return a new record as the next decision on one of the same id, where there is one.

        Args:
            record: made now.
            adopted: ids of decisions of another replica that this one is told of; they are no next ones.
        """
        if (before := self._of(record)) is None:
            return record
        return replace(record, revision=before.revision + (record.retraction_id not in adopted))

    def adopt(self, records: Iterable[SpanRecord]) -> list[SpanRecord]:
        """Take over what another replica decided later; return what was not taken back here before.

        Where the file cannot be written it holds until the server ends: the other replica keeps it as well.
        """
        newer = [r for r in records if r.wins_over(self._of(r))]
        standing_now = [r for r in newer if r.state != "revoked" and not _stands(self._of(r))]
        self.put(newer, must_last=False)
        return standing_now

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _of(self, record: SpanRecord) -> SpanRecord | None:
        """Return what is known under a record's id."""
        return self._records.get(record.extra_key, {}).get(record.retraction_id)

    def _read(self, file: sqlite3.Connection) -> None:
        file.execute("PRAGMA journal_mode=WAL")
        with file:
            file.execute(
                "CREATE TABLE IF NOT EXISTS span_retractions (retraction_id TEXT PRIMARY KEY, record TEXT NOT NULL, "
                "sequence INTEGER NOT NULL)"
            )
            file.execute("CREATE TABLE IF NOT EXISTS identity (ledger_id TEXT NOT NULL)")
            if (row := file.execute("SELECT ledger_id FROM identity").fetchone()) is None:
                file.execute("INSERT INTO identity VALUES (?)", (self.ledger_id,))
            else:
                self.ledger_id = row[0]
        for text, number in file.execute("SELECT record, sequence FROM span_retractions ORDER BY rowid").fetchall():
            self._keep(SpanRecord(**json.loads(text)), number)

    def _keep(self, record: SpanRecord, number: int) -> None:
        self._records.setdefault(record.extra_key, {})[record.retraction_id] = record
        self._changed[record.retraction_id] = number
        self.sequence = max(self.sequence, number)


def _stands(record: SpanRecord | None) -> bool:
    return record is not None and record.state != "revoked"


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
