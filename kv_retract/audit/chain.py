"""The chain: every entry holds the hash of the one before it, so none can be changed or taken out unseen.

An entry is one line of canonical JSON: ASCII, keys sorted, no spaces. Its `hash` is the SHA-256 of that line without
`hash`. A line that is written in any other way is refused, so no byte can be changed that the hash would not see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

FORMAT: Final = "kv-retract audit"
VERSION: Final = 1
MOST_HEADER_BYTES: Final = 4096
"""A first line that is longer is no header, of this version or of any other."""

_BEFORE_HEADER: Final = {"seq": -1, "hash": "0" * 64}
_TEXTS: Final = ("event", "at", "prev", "hash")


def header(at: str) -> dict[str, Any]:
    """Return the first entry of a log; it has `seq` 0."""
    return chained(_BEFORE_HEADER, {"event": "created", "at": at, "format": FORMAT, "version": VERSION})


def chained(before: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry that follows `before`.

    Raises:
        TypeError: a field is not JSON-able.
        ValueError: a field holds a number that JSON has not.
    """
    entry = {**fields, "seq": before["seq"] + 1, "prev": before["hash"]}
    return {**entry, "hash": _hash(entry)}


def to_line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as it stands in the file; `from_line` inverts it."""
    return _canonical(entry) + b"\n"


def from_line(line: bytes) -> dict[str, Any]:
    """Return the entry of a whole line.

    Raises:
        ValueError: it is not one, or was changed; says in a few words how.
    """
    entry, canonical = _parsed(line)
    if not isinstance(entry, dict) or type(entry.get("seq")) is not int:
        raise ValueError("this is no entry of an audit log")
    if any(not isinstance(entry.get(name), str) for name in _TEXTS):
        raise ValueError("this is no entry of an audit log")
    if canonical + b"\n" != line:
        raise ValueError("the entry was changed: it is not written in canonical form")
    if _hash({name: value for name, value in entry.items() if name != "hash"}) != entry["hash"]:
        raise ValueError("the entry was changed: its hash does not fit")
    return entry


def header_from_line(line: bytes) -> dict[str, Any]:
    """Return the first entry of a log.

    Raises:
        ValueError: the line is not the header of a log of this version, or was changed; says how.
    """
    try:
        found, _ = _parsed(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "prev" not in found:
        raise ValueError("this is no audit log of kv-retract: name another file")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"the log begins with entry {found.get('seq')!r} instead of its header: its first lines were cut off"
        )
    if found.get("version") != VERSION:
        raise ValueError(
            f"the log has version {found.get('version')!r}, this kv-retract reads version {VERSION}: use the one that "
            "wrote it, or a newer one"
        )
    entry = from_line(line)
    check_follows(entry, _BEFORE_HEADER)
    return entry


def check_follows(entry: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Check that an entry stands in the chain right behind another.

    Raises:
        ValueError: it does not.
    """
    if entry["seq"] != before["seq"] + 1 or entry["prev"] != before["hash"]:
        raise ValueError(
            f"entry {entry['seq']} does not follow the entry before it, number {before['seq']}: entries were removed, "
            "inserted, repeated or put in another order"
        )


def _parsed(line: bytes) -> tuple[Any, bytes]:
    """Return what a line holds, and its canonical form, which JSON has not for every number that Python reads."""
    try:
        value = json.loads(line.decode("ascii"))
        return value, _canonical(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("this is not JSON") from error


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
