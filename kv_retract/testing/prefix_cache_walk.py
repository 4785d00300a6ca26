"""A random walk of a prefix index beside its oracle."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import numpy as np

from ..cache.base import NO_SLOT, IntArray, PrefixCache
from ..cache.naive import NaiveCache


def rows(slots: IntArray, page_size: int) -> set[tuple[int, ...]]:
    """Return the pages of an aligned run of slots, without their order."""
    return set(map(tuple, slots.reshape(-1, page_size).tolist()))


class RandomWalk:
    """Does the same to an index and to the oracle, and fails where they differ.

    Every page that is inserted has slots of its own, so that a slot tells which page was given up. Seeded: the same
    seed walks the same way, as long as the index evicts the same.
    """

    OPERATIONS: ClassVar[tuple[str, ...]] = ("insert", "match", "exclusive", "remove", "lock", "unlock", "evict")
    NAMESPACES: ClassVar[tuple[str, ...]] = ("", "tenant")
    WEIGHTS: ClassVar[tuple[float, ...]] = (0.3, 0.15, 0.1, 0.1, 0.15, 0.1, 0.1)

    def __init__(self, index: PrefixCache, oracle: NaiveCache, seed: int) -> None:
        self.index, self.oracle, self.size = index, oracle, oracle.page_size
        self.done: Counter[str] = Counter()
        self._rng = np.random.default_rng(seed)
        self._locks: list[tuple[Any, Any]] = []
        self._next_slot = 0

    def step(self) -> None:
        """Do one operation and compare everything that can be seen."""
        name = str(self._rng.choice(self.OPERATIONS, p=self.WEIGHTS))
        self.done[name] += 1
        getattr(self, f"_{name}")()
        self.index.check_integrity()
        assert self.index.evictable_size == self.oracle.evictable_size
        assert self.index.protected_size == self.oracle.protected_size
        held, expected = self.index.held_slots(), self.oracle.held_slots()
        assert len(held) == len(expected) and rows(held, self.size) == rows(expected, self.size)

    def _path(self) -> tuple[IntArray, str]:
        """A path over few names, so that paths share prefixes; its tail may be shorter than a page."""
        names = self._rng.integers(-1, 2, self._rng.integers(1, 7))
        ids: IntArray = (names[:, None] * self.size + np.arange(self.size)).reshape(-1)
        return ids[: len(ids) - self._rng.integers(self.size)], self.NAMESPACES[int(self._rng.integers(5)) == 0]

    def _insert(self) -> None:
        ids, extra_key = self._path()
        slots = self._next_slot + np.arange(len(ids))
        self._next_slot += -(-len(ids) // self.size) * self.size
        hidden = self._rng.random(len(ids)) < 0.3
        hidden[:: self.size] = False  # no page is hidden as a whole: its slots could not tell it
        slots[hidden] = NO_SLOT
        known = self.index.insert(ids, slots, extra_key=extra_key)
        assert known == self.oracle.insert(ids, slots, extra_key=extra_key)

    def _match(self) -> None:
        ids, extra_key = self._path()
        fast, slow = (cache.match_prefix(ids, extra_key=extra_key) for cache in (self.index, self.oracle))
        assert fast.slots.tolist() == slow.slots.tolist()

    def _exclusive(self) -> None:
        (ids, extra_key), locks = self._path(), int(self._rng.integers(3))
        exclusive = self.index.exclusive_from(ids, extra_key=extra_key, locks=locks)
        assert exclusive == self.oracle.exclusive_from(ids, extra_key=extra_key, locks=locks)

    def _remove(self) -> None:
        ids, extra_key = self._path()
        start = int(self._rng.integers(len(ids) + 1))
        given = self.index.remove_tail(ids, start, extra_key=extra_key)
        expected = self.oracle.remove_tail(ids, start, extra_key=extra_key)
        assert len(given) == len(expected) and rows(given, self.size) == rows(expected, self.size)

    def _lock(self) -> None:
        ids, extra_key = self._path()
        nodes = [cache.match_prefix(ids, extra_key=extra_key).node for cache in (self.index, self.oracle)]
        self.index.inc_lock_ref(nodes[0])
        self.oracle.inc_lock_ref(nodes[1])
        self._locks.append((nodes[0], nodes[1]))

    def _unlock(self) -> None:
        if self._locks:
            fast, slow = self._locks.pop(int(self._rng.integers(len(self._locks))))
            self.index.dec_lock_ref(fast)
            self.oracle.dec_lock_ref(slow)

    def _evict(self) -> None:
        wanted = int(self._rng.integers(1, 4 * self.size))
        due = min(wanted, self.oracle.evictable_size)
        given = self.index.evict(wanted)
        assert np.count_nonzero(given != NO_SLOT) >= due, "there was more to give up"
        paths = {page.slots: path for path, page in self.oracle.pages.items()}
        gone = [paths.get(row) for row in map(tuple, given.reshape(-1, self.size).tolist())]
        known = {path for path in gone if path is not None}
        assert len(known) == len(gone), "gave up a page twice, or one that was not indexed"
        assert not any(self.oracle.pages[path].lock_ref for path in known), "gave up a locked page"
        left = self.oracle.pages.keys() - known
        assert not any((key, ids[: -self.size]) in known for key, ids in left), "gave up the middle of a path"
        self.oracle.forget(known)
