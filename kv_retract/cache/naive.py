"""Prefix index by dictionary: the oracle that faster indexes are tested against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..errors import CacheIntegrityError
from .base import NO_SLOT, IntArray, MatchResult, PrefixCache

Path: TypeAlias = tuple[str, tuple[int, ...]]
"""Namespace and all ids from the start of the thread to the end of one page."""


@dataclass(slots=True)
class Page:
    """What is known about one page of one path."""

    slots: tuple[int, ...]
    last_access: int
    hits: int = 0
    lock_ref: int = 0


class NaiveCache(PrefixCache):
    """Obviously correct and slow: every page of every path is an entry of its own, so nothing is ever split.

    Evicts single pages, least recently used leaf first. Cost grows with the square of a path's length.
    """

    def __init__(self, page_size: int = 1) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size = page_size
        self.pages: dict[Path, Page] = {}
        self._clock = 0

    @property
    def evictable_size(self) -> int:
        """Slots not under a lock."""
        return sum(_num_slots(page) for page in self.pages.values() if not page.lock_ref)

    @property
    def protected_size(self) -> int:
        """Slots under a lock."""
        return sum(_num_slots(page) for page in self.pages.values() if page.lock_ref)

    def match_prefix(self, ids: IntArray, *, extra_key: str = "") -> MatchResult:
        """Look up one prefix after the other."""
        matched = self._matched(ids, extra_key)
        self._touch(matched)
        return MatchResult(self._slots(matched), matched[-1] if matched else (extra_key, ()))

    def insert(self, ids: IntArray, slots: IntArray, *, extra_key: str = "") -> int:
        """Add the pages that are missing."""
        if len(ids) != len(slots):
            raise ValueError(f"a path needs one slot per id, got {len(ids)} ids and {len(slots)} slots")
        matched = self._matched(ids, extra_key)
        self._touch(matched)
        for path in list(self._prefixes(ids, extra_key))[len(matched) :]:
            end = len(path[1])
            self.pages[path] = Page(tuple(slots[end - self.page_size : end].tolist()), self._clock)
        return len(matched) * self.page_size

    def evict(self, num_slots: int) -> IntArray:
        """Drop the oldest leaf page until enough is given up."""
        slots: list[int] = []
        taken = 0
        while taken < num_slots and (leaves := self.evictable_leaves()):
            oldest = min(leaves, key=lambda path: self.pages[path].last_access)
            taken += _num_slots(self.pages[oldest])
            slots += self.pages.pop(oldest).slots
        return np.array(slots, dtype=np.int64)

    def inc_lock_ref(self, node: Path) -> None:
        """Count a lock on every page of the path."""
        for path in self._ancestry(node):
            self.pages[path].lock_ref += 1

    def dec_lock_ref(self, node: Path) -> None:
        """Undo one `inc_lock_ref`."""
        paths = self._ancestry(node)
        if any(path not in self.pages or self.pages[path].lock_ref < 1 for path in paths):
            raise CacheIntegrityError("unlocked a path that is not locked")
        for path in paths:
            self.pages[path].lock_ref -= 1

    def exclusive_from(self, ids: IntArray, *, extra_key: str = "", locks: int = 0) -> int:
        """Walk up from the end of the match while nothing else hangs below."""
        matched = self._matched(ids, extra_key)
        keep = len(matched)
        while keep and self._alone(matched[keep - 1], matched[keep:], locks):
            keep -= 1
        return keep * self.page_size

    def remove_tail(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        """Remove pages from the end of the match up to the page that holds `start`."""
        matched = self._matched(ids, extra_key)
        first = keep = len(matched)
        while first > start // self.page_size and self._alone(matched[first - 1], matched[first:keep], 0):
            first -= 1
        slots = self._slots(matched[first:])
        self.forget(matched[first:])
        return slots

    def remove_branches(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        """Remove every page whose path begins with `ids` up to the page that holds `start`, longest paths first."""
        end = (start // self.page_size + 1) * self.page_size
        if len(ids) < end:
            return np.empty(0, dtype=np.int64)
        begin = tuple(ids[:end].tolist())
        through = [path for path in self.pages if path[0] == extra_key and path[1][: len(begin)] == begin]
        free = [path for path in through if not self.pages[path].lock_ref]
        slots = self._slots(free)
        self.forget(free)
        return slots

    def held_slots(self) -> IntArray:
        """All slots, one row per page of a path."""
        return self._slots(self.pages)

    def paths(self) -> Iterator[tuple[str, IntArray, IntArray]]:
        """Join the pages of every path that no page follows."""
        inner = {(extra_key, ids[: -self.page_size]) for extra_key, ids in self.pages}
        leaves = [path for path in self.pages if path not in inner]
        for path in sorted(leaves, key=lambda path: self.pages[path].last_access):
            yield path[0], np.array(path[1], dtype=np.int64), self._slots(self._ancestry(path))

    def check_integrity(self) -> None:
        """Check that every page has its predecessor and is locked no more often than it."""
        for (extra_key, ids), page in self.pages.items():
            if len(ids) % self.page_size or len(page.slots) != self.page_size:
                raise CacheIntegrityError("an entry is not one page")
            before = self.pages.get((extra_key, ids[: -self.page_size]))
            if len(ids) > self.page_size and (before is None or before.lock_ref < page.lock_ref):
                raise CacheIntegrityError("a page is indexed or locked without the page before it")

    def forget(self, paths: Iterable[Path]) -> None:
        """Drop pages without asking: to follow an eviction that another index chose."""
        for path in list(paths):
            del self.pages[path]

    def evictable_leaves(self) -> list[Path]:
        """Return unlocked pages that no indexed page follows."""
        inner = {(extra_key, ids[: -self.page_size]) for extra_key, ids in self.pages}
        return [path for path, page in self.pages.items() if path not in inner and not page.lock_ref]

    def check_eviction(self, evicted: Iterable[Path]) -> None:
        """Check that another index may evict these pages: closed under "follows", unlocked, least recent first.

        Raises:
            CacheIntegrityError: an evicted page is unknown, locked, followed by one that stays, or was used more
                recently than a leaf that stays.
        """
        gone = set(evicted)
        if any(path not in self.pages or self.pages[path].lock_ref for path in gone):
            raise CacheIntegrityError("evicted a page that is locked or not indexed")
        stay = [path for path in self.pages if path not in gone]
        if any((extra_key, ids[: -self.page_size]) in gone for extra_key, ids in stay):
            raise CacheIntegrityError("evicted a page from the middle of a path")
        inner = {(extra_key, ids[: -self.page_size]) for extra_key, ids in stay}
        leaves = [self.pages[path].last_access for path in stay if path not in inner and not self.pages[path].lock_ref]
        if gone and leaves and max(self.pages[path].last_access for path in gone) > min(leaves):
            raise CacheIntegrityError("evicted a page that was used more recently than a leaf that stays")

    def _alone(self, path: Path, below: list[Path], locks: int) -> bool:
        """Whether no other page than the first of `below` follows, and at most `locks` locks are held."""
        extra_key, ids = path
        followers = [p for p in self.pages if p[0] == extra_key and p[1][: -self.page_size] == ids and p[1]]
        return followers == below[:1] and self.pages[path].lock_ref <= locks

    def _prefixes(self, ids: IntArray, extra_key: str) -> Iterator[Path]:
        for end in range(self.page_size, len(ids) + 1, self.page_size):
            yield extra_key, tuple(ids[:end].tolist())

    def _ancestry(self, node: Path) -> list[Path]:
        return list(self._prefixes(np.array(node[1], dtype=np.int64), node[0]))

    def _matched(self, ids: IntArray, extra_key: str) -> list[Path]:
        matched = []
        for path in self._prefixes(ids, extra_key):
            if path not in self.pages:
                break
            matched.append(path)
        return matched

    def _touch(self, paths: list[Path]) -> None:
        self._clock += 1
        for path in paths:
            self.pages[path].last_access = self._clock
            self.pages[path].hits += 1

    def _slots(self, paths: Iterable[Path]) -> IntArray:
        return np.array([slot for path in paths for slot in self.pages[path].slots], dtype=np.int64)


def _num_slots(page: Page) -> int:
    return sum(slot != NO_SLOT for slot in page.slots)
