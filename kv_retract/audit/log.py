"""The log itself: an observer that writes down what a session decides, before the session does it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import AuditError
from ..events import Event, Observer, now
from .chain import MOST_HEADER_BYTES, chained, from_line, header, header_from_line, to_line
from .entries import fields_of
from .file import append, create, locked, naming, opened

_TAIL_BYTES = 4096


class AuditLog(Observer):
    """Appends one line of JSON per event to a file, each with the hash of the one before; durable on return.

    An entry `decided` or `status_changes` is written before the session acts on it, and a session stops where it
    cannot be written. So nothing that was done can be missing, but an entry says what was decided, not what took
    effect: a crash, or an error of the ledger, may leave one behind that did not. The retraction is then tried again
    at the next step, and writes another. `erased`, `healed` and `diverged` are written afterwards; after a crash, or
    where they could not be written, they are missing.

    The file holds no text of a thread. It holds what the caller calls its threads and actors, the reasons that
    policies give, and the SHA-256 of every span, from which a short secret can be guessed: it is made readable for
    its owner only.

    Several sessions, threads and processes may use one file; forks too. The log holds nothing open between two
    events, so closing does nothing.

    Args:
        path: the file; made where there is none, in a folder that must exist. Its file system must have hard links
            and locks (`flock`).

    Raises:
        AuditError: the file cannot be read and written, is no audit log, was damaged at its end, or is of a newer
            version. It is left as it is. `on_event` may raise it later, for the same reasons; also where the disk is
            full, or the file is gone or shorter than what this log has written.
    """

    required: ClassVar[bool] = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._seen = 0
        with naming(self.path, "written"):
            if not self.path.exists():
                create(self.path, to_line(header(now())))
        with opened(self.path, write=True) as descriptor, locked(descriptor, self.path, write=True):
            self._tail(descriptor)

    def on_event(self, event: Event) -> None:
        """Write the entry of an event; nothing for `Stepped`.

        Raises:
            AuditError: see the class. Nothing was written then.
        """
        fields = fields_of(event)
        if fields is None:
            return
        with opened(self.path, write=True) as descriptor, locked(descriptor, self.path, write=True):
            tail = self._tail(descriptor)
            newest, lines = tail.newest, b""
            if tail.torn:
                newest = chained(newest, {"event": "recovered", "at": now(), "torn_bytes": len(tail.torn)})
                lines = to_line(newest)
            lines += to_line(self._entry(newest, fields))
            append(descriptor, lines, end=tail.end, torn=tail.torn)
            self._seen = tail.end + len(lines)

    def _entry(self, newest: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        try:
            return chained(newest, fields)
        except (TypeError, ValueError) as error:
            raise AuditError(
                f"audit log {str(self.path)!r}: the event {fields['event']!r} cannot be written as JSON ({error}); "
                "give actor, thread id and reasons as plain text"
            ) from error

    def _tail(self, descriptor: int) -> _Tail:
        """Read where the log ends; the file is locked."""
        try:
            first, newline, _ = os.pread(descriptor, MOST_HEADER_BYTES, 0).partition(b"\n")
            header_from_line(first + newline)
        except ValueError as error:
            raise AuditError(f"audit log {str(self.path)!r}: {error}") from error
        size, data = os.fstat(descriptor).st_size, b""
        if size < self._seen:
            raise AuditError(
                f"audit log {str(self.path)!r} has {size} bytes and had {self._seen}: its end was cut off while it was "
                "in use; keep the file for whoever looks into it, and move it aside to begin a new one"
            )
        while data.count(b"\n") < 2 and len(data) < size:
            length = min(max(2 * len(data), _TAIL_BYTES), size)
            data = os.pread(descriptor, length, size - length)
        lines = data[: data.rindex(b"\n") + 1]
        torn = data[len(lines) :]
        try:
            newest = from_line(lines[lines.rfind(b"\n", 0, -1) + 1 :])
        except ValueError as error:
            raise AuditError(
                f"audit log {str(self.path)!r}, last line: {error}; keep the file for whoever looks into it, and move "
                "it aside to begin a new one"
            ) from error
        return _Tail(newest, size - len(torn), torn)


class _Tail(NamedTuple):
    newest: dict[str, Any]
    """The last entry that is whole."""
    end: int
    """Byte behind it."""
    torn: bytes
    """What stands there: the beginning of an entry whose writing was interrupted."""
