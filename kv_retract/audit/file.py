"""The file of an audit log: opening, locking, making it, and adding to it so that it is on the disk."""

from __future__ import annotations

import fcntl
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AuditError

_LOCK_SECONDS = 30.0
_POLL_SECONDS = 0.001


@contextmanager
def opened(path: Path, *, write: bool) -> Iterator[int]:
    """Open the file of a log; the descriptor is closed at the end of the block.

    Only for one call: what is opened before a fork shares its lock with the child.

    Raises:
        AuditError: there is no such file, or what the system says against using it; also for OSErrors of the block.
    """
    with naming(path, "written" if write else "read"):
        # Append only, so that the file may carry the attribute of that name. Without O_NONBLOCK a pipe would block.
        flags = os.O_RDWR | os.O_APPEND if write else os.O_RDONLY
        descriptor = os.open(path, flags | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise AuditError(f"audit log {str(path)!r} is no regular file; name another place")
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def locked(descriptor: int, path: Path, *, write: bool) -> Iterator[None]:
    """Keep other writers out, threads and processes; with `write` also those who look where the log ends.

    Raises:
        AuditError: another one holds the lock for too long.
    """
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise AuditError(
                    f"audit log {str(path)!r} was locked for {_LOCK_SECONDS:.0f} seconds; look for a process that "
                    "uses it and was stopped"
                ) from None
            time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        # Closing would not do: a child that was forked meanwhile holds the same lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def create(path: Path, content: bytes) -> None:
    """Make a file under another name and link it into place: nobody ever sees half of one.

    Does nothing where another process was faster. Raises OSError.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def append(descriptor: int, content: bytes, *, end: int, torn: bytes) -> None:
    """Put `content` at `end` in place of the bytes that are `torn`; it is on the disk when the call returns.

    Where that fails the file is what it was before. Raises OSError.
    """
    try:
        if torn:
            os.ftruncate(descriptor, end)
        _write(descriptor, content)
        os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):  # then the next one finds a torn line
            os.ftruncate(descriptor, end)
            _write(descriptor, torn)
        raise


@contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into an AuditError that names the file."""
    try:
        yield
    except OSError as error:
        raise AuditError(
            f"audit log {str(path)!r} cannot be {doing}: {error.strerror or error}; check that it is a file in a "
            f"folder that exists, that both can be {doing}, and that the disk is not full"
        ) from error


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
