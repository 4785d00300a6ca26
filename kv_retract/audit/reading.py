"""Reading a log back, every entry checked against the one before it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AuditError
from .chain import MOST_HEADER_BYTES, check_follows, from_line, header_from_line
from .file import locked, opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a whole log holds."""

    entries: int
    """Without the header."""
    head: str
    """Hash of the newest entry, or of the header. Kept elsewhere, it shows later whether entries were cut from the
    end."""
    first_at: str
    """When the first entry was written, or the log was made."""
    last_at: str
    torn_bytes: int
    """Length of an unfinished last line: the writing of an entry was interrupted, and nothing depends on it. The next
    entry takes its place, behind an entry `recovered`."""
    clock_steps: int
    """How many entries have an earlier time than the one before: a clock was set, or several processes wrote at
    once. The order is that of the file."""


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log, oldest first, without the header; each when it has been checked.

    Entries that are written meanwhile are not among them, nor is an unfinished last line.

    Raises:
        AuditError: as `verify`, when the iterator comes to the place.
    """
    entries = iter(_Chain(Path(path)))
    next(entries)
    yield from entries


def verify(path: str | os.PathLike[str], *, head: str | None = None) -> Verified:
    """Check a whole log; it may be in use.

    The file alone cannot show that its last entries were cut off, or that all of it was written anew.

    Args:
        path: the file.
        head: what `Verified.head` was at an earlier time: must be the hash of one of its entries.

    Raises:
        AuditError: an entry was changed, removed, repeated or put elsewhere; the log does not hold `head`; or it is
            no audit log, of a newer version, or cannot be read. Names the line.
    """
    if head is not None and not re.fullmatch("[0-9a-f]{64}", head):
        raise AuditError(f"expected a head of 64 hexadecimal digits, as verifying a log returns it, got {head!r}")
    chain = _Chain(Path(path))
    entries = iter(chain)
    newest = first = next(entries)
    found, clock_steps = head in (None, first["hash"]), 0
    for entry in entries:
        if first["seq"] == 0:
            first = entry
        found |= entry["hash"] == head
        clock_steps += entry["at"] < newest["at"]
        newest = entry
    if not found:
        raise AuditError(
            f"audit log {str(path)!r}: none of its entries has the hash {head}; they were cut from its end or written "
            "anew, or this is the head of another log"
        )
    return Verified(
        entries=newest["seq"],
        head=newest["hash"],
        first_at=first["at"],
        last_at=newest["at"],
        torn_bytes=chain.torn_bytes,
        clock_steps=clock_steps,
    )


class _Chain:
    """Iterates over the entries of a log, the header first.

    Attributes:
        torn_bytes: length of the unfinished last line, at the end of the iteration.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.torn_bytes = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        before: dict[str, Any] | None = None
        for number, line in enumerate(self._lines(), start=1):
            if before is not None and not line.endswith(b"\n"):
                self.torn_bytes = len(line)
                return
            try:
                entry = from_line(line) if before is not None else header_from_line(line)
                if before is not None:
                    check_follows(entry, before)
            except ValueError as error:
                advice = "; the lines before it are whole, compare the rest with a copy" if before else ""
                raise AuditError(f"audit log {str(self._path)!r}, line {number}: {error}{advice}") from error
            yield entry
            before = entry

    def _lines(self) -> Iterator[bytes]:
        """Yield what was in the file at one moment at which nobody was writing."""
        with opened(self._path, write=False) as descriptor:
            with locked(descriptor, self._path, write=False):
                left = os.fstat(descriptor).st_size
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                line = file.readline(min(left, MOST_HEADER_BYTES))
                yield line  # also where the file is empty: that is no log
                while (left := left - len(line)) and (line := file.readline(left)):
                    yield line
