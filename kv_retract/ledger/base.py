"""The contract of a ledger: durable retraction state, by thread (DESIGN D1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Self

from ..errors import LedgerError
from ..types import RetractionRecord, Status


class Ledger(ABC):
    """Keeps what was retracted in each thread. Never holds the retracted text.

    Safe to use from several Python threads. Every change is atomic, and done when the call returns. A context
    manager: leaving it closes the ledger.
    """

    @abstractmethod
    def records(self, thread_id: str) -> tuple[RetractionRecord, ...]:
        """Return the records of a thread in the order in which they were added, with their newest status."""

    @abstractmethod
    def add(self, thread_id: str, records: Iterable[RetractionRecord]) -> None:
        """Append records, all or none. One whose `retraction_id` is known already is left as it is, status too."""

    @abstractmethod
    def set_status(self, thread_id: str, statuses: Mapping[str, Status], *, only: Status | None = None) -> None:
        """Change statuses by `retraction_id`, all or none.

        Args:
            thread_id: of the records.
            statuses: the new ones.
            only: leave records alone that have another status than this one now.

        Raises:
            LedgerError: the thread has no such retraction.
        """

    @abstractmethod
    def fork(self, source: str, target: str) -> None:
        """Copy the records of `source` to the thread `target`, which has none, or the same ones already.

        Raises:
            LedgerError: `target` has other records.
        """

    @abstractmethod
    def threads(self) -> list[str]:
        """Return the threads that have records, sorted."""

    def close(self) -> None:
        """Let go of files. The ledger cannot be used afterwards; closing twice is harmless."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def new_records(known: Iterable[RetractionRecord], records: Iterable[RetractionRecord]) -> list[RetractionRecord]:
    """Return the records whose id is not known yet, each once."""
    seen = {r.retraction_id for r in known}
    new: dict[str, RetractionRecord] = {}
    for r in records:
        if r.retraction_id not in seen:
            new.setdefault(r.retraction_id, r)
    return list(new.values())


def with_statuses(
    thread_id: str, records: Iterable[RetractionRecord], statuses: Mapping[str, Status], only: Status | None = None
) -> list[RetractionRecord]:
    """Return the records that change, with their new status.

    Raises:
        LedgerError: an id is unknown.
    """
    known = {r.retraction_id: r for r in records}
    if missing := [i for i in statuses if i not in known]:
        raise LedgerError(
            f"thread {thread_id!r} has no retraction {missing[0]!r} among its {len(known)}; see Ledger.records"
        )
    return [
        replace(known[i], status=Status(s))
        for i, s in statuses.items()
        if known[i].status is not Status(s) and (only is None or known[i].status is only)
    ]


def records_to_fork(
    source: str, target: str, mine: Iterable[RetractionRecord], theirs: Iterable[RetractionRecord]
) -> list[RetractionRecord]:
    """Return what `Ledger.fork` has to copy; raises LedgerError as it does."""
    mine, theirs = list(mine), list(theirs)
    if theirs and theirs != mine:
        raise LedgerError(
            f"cannot fork {source!r} into {target!r}: it has {len(theirs)} other retractions; fork into a new thread id"
        )
    return [] if theirs else mine
