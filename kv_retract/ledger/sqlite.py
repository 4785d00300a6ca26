"""A ledger in one SQLite file, for several threads and processes at once.

The file is an append-only log of changes that is folded when it is read. Write-ahead log, synchronous FULL: a change
is on the disk when the call returns.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import quote

from ..errors import LedgerError
from ..types import RetractionRecord, Status
from .base import Ledger, new_records, records_to_fork, with_statuses
from .forks import ClosesAroundForks, close_around_forks

VERSION: Final = 1
"""Of the file's form, kept in `user_version`."""
APPLICATION_ID: Final = 0x6B767274  # "kvrt"

_BUSY_SECONDS = 30.0
_SCHEMA = """
CREATE TABLE changes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    thread_id TEXT NOT NULL,
    retraction_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('add', 'status')),
    data TEXT NOT NULL
) STRICT;
CREATE INDEX changes_of_thread ON changes (thread_id, seq);
CREATE UNIQUE INDEX added_once ON changes (thread_id, retraction_id) WHERE kind = 'add';
"""
_CORRUPT = "restore it from a backup; moving it aside starts an empty ledger, which lets retracted text be read again"


class SqliteLedger(Ledger, ClosesAroundForks):
    """Keeps records in an SQLite file, which is created where there is none.

    A process that has a ledger open must not open its file by other means than SQLite: closing a file gives up all
    POSIX locks that the process has on it, and another process may then discard the write-ahead log in use
    (sqlite.org/howtocorrupt.html, section 2.2).

    Args:
        path: the file; its folder must exist. Beside it SQLite keeps `-wal` and `-shm` files.

    Raises:
        LedgerError: the file is corrupt, truncated, of a newer version, not a ledger, or cannot be read and written;
            or it is gone, and its log of changes is still there. It is left as it is. Every method may raise it
            later, for the same reasons; also where the file was removed, replaced or cut meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._opened: list[os.stat_result] = []
        close_around_forks(self)
        with self._lock, self._naming_the_file():
            self._create_if_missing()
            self._check()
            self._connection = self._connect()

    def records(self, thread_id: str) -> tuple[RetractionRecord, ...]:
        """See the base class."""
        with self._open() as db:
            return self._fold(db, thread_id)

    def add(self, thread_id: str, records: Iterable[RetractionRecord]) -> None:
        """See the base class."""
        added = list(records)  # the caller's code must not run within the transaction
        with self._writing() as db:
            self._insert(db, thread_id, new_records(self._fold(db, thread_id), added))

    def set_status(self, thread_id: str, statuses: Mapping[str, Status], *, only: Status | None = None) -> None:
        """See the base class."""
        with self._writing() as db:
            changed = with_statuses(thread_id, self._fold(db, thread_id), statuses, only)
            db.executemany(
                "INSERT INTO changes (thread_id, retraction_id, kind, data) VALUES (?, ?, 'status', ?)",
                [(thread_id, r.retraction_id, r.status.value) for r in changed],
            )

    def fork(self, source: str, target: str) -> None:
        """See the base class."""
        with self._writing() as db:
            copied = records_to_fork(source, target, self._fold(db, source), self._fold(db, target))
            self._insert(db, target, copied)

    def threads(self) -> list[str]:
        """See the base class."""
        with self._open() as db:
            return sorted(row[0] for row in db.execute("SELECT DISTINCT thread_id FROM changes"))

    def close(self) -> None:
        """See the base class."""
        with self._lock:
            self._disconnect()
            self._closed = True

    def before_fork(self) -> None:
        """Close the connection: SQLite must not be carried into a child, which would believe in locks it has not."""
        self._lock.acquire()
        self._disconnect()

    def after_fork(self) -> None:
        """Let the next use connect again."""
        self._lock.release()

    # -- rows -------------------------------------------------------------------------------------------------------

    def _fold(self, db: sqlite3.Connection, thread_id: str) -> tuple[RetractionRecord, ...]:
        folded: dict[str, RetractionRecord] = {}
        rows = db.execute("SELECT retraction_id, kind, data FROM changes WHERE thread_id = ? ORDER BY seq", [thread_id])
        try:
            for retraction_id, kind, data in rows:
                if kind == "add":
                    folded[retraction_id] = RetractionRecord.from_json(json.loads(data))
                else:
                    folded[retraction_id] = replace(folded[retraction_id], status=Status(data))
        except (ValueError, KeyError) as error:
            raise LedgerError(f"ledger {str(self.path)!r}, thread {thread_id!r}: {error!r}; {_CORRUPT}") from error
        return tuple(folded.values())

    def _insert(self, db: sqlite3.Connection, thread_id: str, records: Iterable[RetractionRecord]) -> None:
        db.executemany(
            "INSERT INTO changes (thread_id, retraction_id, kind, data) VALUES (?, ?, 'add', ?)",
            [(thread_id, r.retraction_id, json.dumps(r.to_json())) for r in records],
        )

    # -- file -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: the lock is taken before the first read, so no other process can change what was read."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._naming_the_file():
            if self._closed:
                raise LedgerError(f"ledger {str(self.path)!r} is closed; open a new SqliteLedger")
            if self._connection is None:
                self._connection = self._connect()
            self._check_in_place()
            yield self._connection

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"ledger {str(self.path)!r} cannot be used: {error}; check that its folder exists, that file and "
                "folder can be read and written, that the disk is not full, and that no other process blocks it"
            ) from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"ledger {str(self.path)!r} is corrupt: {error}; {_CORRUPT}") from error
        except OSError as error:
            raise LedgerError(
                f"ledger {str(self.path)!r} cannot be opened: {error.strerror or error}; name a file that can be read "
                "and written, in a folder that exists"
            ) from error
        except UnicodeEncodeError as error:
            raise LedgerError(f"ledger {str(self.path)!r}: {error}; thread ids must be valid Unicode") from error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _create_if_missing(self) -> None:
        # Looked for first: another process that makes the ledger at this moment makes its log afterwards.
        log = Path(f"{os.path.realpath(self.path)}-wal")
        has_log = log.exists() and log.stat().st_size > 0
        if self.path.exists():
            return
        if has_log:
            raise LedgerError(
                f"ledger {str(self.path)!r} is gone, but {log.name!r} holds changes of it; put the ledger back beside "
                "it; moving both aside starts an empty ledger, which lets retracted text be read again"
            )
        _create(self.path)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._uri("rw"), uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False,
            cached_statements=32,
        )  # fmt: skip
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_mode = WAL")  # a backup may have lost it; opens the log
        self._opened = self._files()
        return connection

    def _uri(self, mode: str) -> str:
        return f"file:{quote(str(self.path.absolute()))}?mode={mode}"

    def _files(self) -> list[os.stat_result]:
        """Look at file and log; while a connection is open nobody has a reason to remove either, or to cut the file."""
        path = os.path.realpath(self.path)
        return [os.stat(path), os.stat(f"{path}-wal")]

    def _check_in_place(self) -> None:
        """Refuse to go on where another file stands in the place: what is written to the one that is open is lost."""
        try:
            files = self._files()
        except FileNotFoundError:
            files = []
        same = [*map(_identity, files)] == [*map(_identity, self._opened)]
        if not same or files[0].st_size < self._opened[0].st_size:
            raise LedgerError(
                f"ledger {str(self.path)!r} or its log of changes (-wal) was removed, replaced or cut while it was in "
                f"use; put both back, or {_CORRUPT}"
            )
        self._opened = files

    def _check(self) -> None:
        """Refuse a file before anything may be written to it. Only SQLite may open it: see the class."""
        if not os.access(self.path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not (length := self.path.stat().st_size):
            raise LedgerError(f"ledger {str(self.path)!r} is empty; name another file, or {_CORRUPT}")
        with closing(sqlite3.connect(self._uri("ro"), uri=True, timeout=_BUSY_SECONDS, isolation_level=None)) as db:
            application = db.execute("PRAGMA application_id").fetchone()[0]
            page_size = db.execute("PRAGMA page_size").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if application != APPLICATION_ID:
                raise LedgerError(f"ledger {str(self.path)!r} is another program's database; name another file")
            if version != VERSION:
                raise LedgerError(
                    f"ledger {str(self.path)!r} has version {version}, this kv-retract reads version {VERSION}; "
                    "use the version of kv-retract that wrote it, or a newer one"
                )
            # SQLite reads the missing end of a page as zeros, and its own check may not notice.
            if length % page_size:
                raise LedgerError(
                    f"ledger {str(self.path)!r} is corrupt: {length} bytes are no whole pages; {_CORRUPT}"
                )
            if (problem := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise LedgerError(f"ledger {str(self.path)!r} is corrupt: {problem}; {_CORRUPT}")


def _identity(file: os.stat_result) -> tuple[int, int]:
    return file.st_dev, file.st_ino


def _create(path: Path) -> None:
    """Make an empty ledger under another name and link it into place: nobody ever sees half of one."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with closing(sqlite3.connect(draft, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT;"
            )
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was faster
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
