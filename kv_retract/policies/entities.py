"""Which earlier reads speak of the entity that a call names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from .tool_results import any_glob, canonical

Pairs = dict[str, str]
"""Argument name to canonical value, sorted by name: what a call says about its entity."""

_MOST_NAMES = 4
# Reads are indexed under every subset of their names, so that a look-up never scans; more names than this do not occur.


def entity_pairs(arguments: Mapping[str, Any], keys: Sequence[str]) -> Pairs:
    """Return the arguments whose names match one of the globs `keys`; of many, the first four by name.

    Values that say nothing (null, empty text) are left out.
    """
    names = sorted(name for name in arguments if any_glob(name, keys) and arguments[name] not in (None, ""))
    return {name: canonical(arguments[name]) for name in names[:_MOST_NAMES]}


class OpenReads:
    """Reads that nothing has made stale yet, found by reader and entity without scanning."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]], list[int]] = {}
        self._signatures: dict[str, dict[tuple[str, ...], None]] = {}
        self._taken: set[int] = set()

    def readers(self) -> list[str]:
        """Names of the tools that have read something, in the order of their first read."""
        return list(self._signatures)

    def add(self, reader: str, pairs: Pairs, message: int) -> None:
        """Keep the read in `message`; `pairs` is not empty."""
        names = tuple(pairs)
        self._signatures.setdefault(reader, {})[names] = None
        for size in range(1, len(names) + 1):
            for subset in combinations(pairs.items(), size):
                self._buckets.setdefault((reader, names, subset), []).append(message)

    def take(self, reader: str, pairs: Pairs) -> list[int]:
        """Remove and return the reads by `reader` that agree with `pairs` on all names both have, at least one."""
        found: list[int] = []
        for names in self._signatures.get(reader, ()):
            common = tuple((name, pairs[name]) for name in names if name in pairs)
            if common:
                found += self._buckets.pop((reader, names, common), ())
        fresh = [message for message in found if message not in self._taken]
        self._taken.update(fresh)
        return sorted(fresh)
