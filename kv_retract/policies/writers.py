"""Which tool makes the results of which other tool stale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from typing import Final

from ..errors import PolicyError

TAU_BENCH_AIRLINE: Final[Mapping[str, tuple[str, ...]]] = {
    "get_reservation_details": ("cancel_reservation", "update_reservation_*"),
}
"""The airline tools of tau-bench (sierra-research/tau-bench), spelled out; `DEFAULT_WRITERS` covers them too."""

SWE_AGENT: Final[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
    ("open", "goto", "scroll_*", "create", "edit"), ("edit", "insert", "append")
)
"""The file viewer of SWE-agent: every command answers with a window on the open file, also `edit`."""

_CHANGES = ("update_*", "modify_*", "cancel_*", "delete_*", "remove_*", "set_*", "change_*", "edit_*", "patch_*")
_FILE_CHANGES = ("edit*", "write*", "str_replace*", "insert*", "append*", "create_file", "delete_file")

DEFAULT_WRITERS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("get_{entity}_details", "get_{entity}_info", "get_{entity}", "read_{entity}", "fetch_{entity}"),
        tuple(change + "{entity}*" for change in _CHANGES),
    ),
    **SWE_AGENT,
    **dict.fromkeys(("read_file", "view*", "cat"), _FILE_CHANGES),
}
"""Readers and writers that name the same entity, as `get_order_details` and `cancel_pending_order`; and files."""

_MOST_PAIRS = 4096


class WriterTable:
    """Look-up from a writer to the readers whose results it makes stale; every pair of names is matched once.

    Safe to share between threads.

    Args:
        writers: glob of a reader to globs of writers. `{entity}` in a reader's glob stands for some text of its name,
            in a writer's glob for the same text; the shortest text that matches counts. All globs that match a reader
            add up, but of those with `{entity}` only the first.

    Raises:
        PolicyError: a reader or its writers are not text, or a writer uses `{entity}` and its reader does not.
    """

    def __init__(self, writers: Mapping[str, Sequence[str]]) -> None:
        self._rules = [(_pattern(reader), "{entity}" in reader, tuple(globs)) for reader, globs in writers.items()]
        self._patterns: dict[str, tuple[re.Pattern[str], ...]] = {}
        self._pairs: dict[tuple[str, str], bool] = {}
        for reader, globs in writers.items():
            if isinstance(globs, str) or not all(isinstance(glob, str) for glob in globs):
                raise PolicyError(f"expected a list of globs as the writers of {reader!r}, got {globs!r}")
            if "{entity}" not in reader and any("{entity}" in glob for glob in globs):
                raise PolicyError(f"the writers {globs!r} use {{entity}}, but their reader {reader!r} does not")

    def is_reader(self, name: str) -> bool:
        """Whether results of this tool can become stale."""
        return bool(self._writers_of(name))

    def stale_after(self, writer: str, readers: Iterable[str]) -> list[str]:
        """Return those of `readers` whose results on the same entity are stale after a call of `writer`."""
        return [reader for reader in readers if self._matches(reader, writer)]

    def _matches(self, reader: str, writer: str) -> bool:
        pair = (reader, writer)
        found = self._pairs.get(pair)
        if found is None:
            if len(self._pairs) >= _MOST_PAIRS:  # names come from models
                self._pairs.clear()
                self._patterns.clear()
            found = self._pairs[pair] = any(pattern.fullmatch(writer) for pattern in self._writers_of(reader))
        return found

    def _writers_of(self, reader: str) -> tuple[re.Pattern[str], ...]:
        patterns = self._patterns.get(reader)
        if patterns is None:
            found: list[str] = []
            named = False
            for pattern, names_entity, globs in self._rules:
                match = pattern.fullmatch(reader)
                if match is None or (names_entity and named):
                    continue
                named = named or names_entity
                found += [_filled(glob, match["entity"]) if names_entity else glob for glob in globs]
            patterns = self._patterns[reader] = tuple(re.compile(translate(glob)) for glob in found)
        return patterns


def _pattern(reader: str) -> re.Pattern[str]:
    head, hole, tail = reader.partition("{entity}")
    if not hole:
        return re.compile(translate(reader))
    # fnmatch.translate() anchors what it returns, so the two halves around the hole are translated by hand.
    return re.compile(f"{_unanchored(head)}(?P<entity>.+?){_unanchored(tail)}", re.DOTALL)


def _unanchored(glob: str) -> str:
    return "".join(".*" if char == "*" else "." if char == "?" else re.escape(char) for char in glob)


def _filled(glob: str, entity: str) -> str:
    # Names are other people's text: what would be special in a glob must stand for itself.
    return glob.replace("{entity}", "".join(f"[{char}]" if char in "*?[" else char for char in entity))
