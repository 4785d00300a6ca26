"""A ledger that lives as long as its process."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from ..types import RetractionRecord, Status
from .base import Ledger, new_records, records_to_fork, with_statuses


class MemoryLedger(Ledger):
    """Keeps records in a dictionary: for tests, and where a framework's checkpoints are the durable copy."""

    def __init__(self) -> None:
        self._threads: dict[str, dict[str, RetractionRecord]] = {}
        self._lock = threading.RLock()  # a stream that is collected as garbage may ask inside of a call

    def records(self, thread_id: str) -> tuple[RetractionRecord, ...]:
        """See the base class."""
        with self._lock:
            return self._get(thread_id)

    def add(self, thread_id: str, records: Iterable[RetractionRecord]) -> None:
        """See the base class."""
        with self._lock:
            self._put(thread_id, new_records(self._get(thread_id), records))

    def set_status(self, thread_id: str, statuses: Mapping[str, Status], *, only: Status | None = None) -> None:
        """See the base class."""
        with self._lock:
            self._put(thread_id, with_statuses(thread_id, self._get(thread_id), statuses, only))

    def fork(self, source: str, target: str) -> None:
        """See the base class."""
        with self._lock:
            self._put(target, records_to_fork(source, target, self._get(source), self._get(target)))

    def threads(self) -> list[str]:
        """See the base class."""
        with self._lock:
            return sorted(self._threads)

    def _get(self, thread_id: str) -> tuple[RetractionRecord, ...]:
        return tuple(self._threads.get(thread_id, {}).values())

    def _put(self, thread_id: str, records: Iterable[RetractionRecord]) -> None:
        if changed := {r.retraction_id: r for r in records}:
            self._threads.setdefault(thread_id, {}).update(changed)
