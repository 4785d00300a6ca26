"""One atomic edit of a cached path: copy-on-write where it is shared, in place where it is not."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from .base import NO_SLOT, IntArray
from .lease import Lease

if TYPE_CHECKING:
    from .manager import CacheManager

_SHARED, _IN_PLACE, _FRESH = 0, 1, 2


class PathEdit:
    """A staged version of a cached path; the path itself stays until `commit`.

    Entries that are not owned keep their slots, shared with whoever has them: re-keying moves references and copies
    nothing. A context manager: leaving it without `commit` aborts. Open and close it under one hold of the lock that
    guards the manager: what is owned in place can be seen on the old path before the commit.

    Attributes:
        lease: the path as it is, locked.
        num_entries: its length.
        slots: the staged slots. Shape: (num_entries,)
        slots_copied: slots that had to be copied because others share them.
        fresh_pages: pages that the edit holds.
    """

    def __init__(self, manager: CacheManager, lease: Lease, exclusive_from: int, start: int) -> None:
        if start < 0:
            raise ValueError(f"an edit starts at an entry of the path, got start={start}")
        self.lease, self.num_entries, self.slots = lease, len(lease), lease.slots.copy()
        self.slots_copied = 0
        self.fresh_pages: IntArray = np.empty(0, dtype=np.int64)
        self._manager, self._size, self._exclusive_from = manager, manager.pool.page_size, exclusive_from
        num_pages = self.num_entries // self._size
        self._first = min(start // self._size, num_pages)  # the first key page that the edit may change
        self._state = np.full(num_pages, _SHARED, dtype=np.int8)  # of the page that each key page is staged with
        self._written_from = num_pages  # the first key page that was owned in place
        self._done = False

    def own(self, index: IntArray) -> IntArray:
        """Make the slots of entries safe to write and return them. Shape: (len(index),).

        In place where nothing else uses the page, else in a copy of it.

        Raises:
            ValueError: an entry is hidden or lies outside of the edit.
            PoolExhaustedError: no room for the copies; nothing changes.
        """
        self._check(index)
        if np.any(self.slots[index] == NO_SLOT):
            raise ValueError("hidden entries have no slots to write; give them some with allocate()")
        self._own_pages(np.unique(index // self._size))
        return self.slots[index]

    def allocate(self, index: IntArray) -> IntArray:
        """Give hidden entries slots of their own, zeroed, and return them. Shape: (len(index),).

        Raises:
            ValueError: an entry has a slot already or lies outside of the edit.
            PoolExhaustedError: no room; every entry keeps the slot and the contents it had.
        """
        self._check(index)
        if np.any(self.slots[index] != NO_SLOT):
            raise ValueError("some entries have slots already; make those safe to write with own()")
        key_pages = np.unique(index // self._size)
        pages = self._pages()
        self._own_pages(key_pages[pages[key_pages] != NO_SLOT])
        bare = key_pages[pages[key_pages] == NO_SLOT]
        fresh = self._manager.alloc(len(bare))
        self.fresh_pages = np.concatenate([self.fresh_pages, fresh])
        self._state[bare] = _FRESH
        pages = self._pages()
        pages[bare] = fresh
        self.slots[index] = pages[index // self._size] * self._size + index % self._size
        self._manager.pool.wipe(self.slots[index])
        return self.slots[index]

    def hide(self, start: int, end: int) -> None:
        """Leave `[start, end)` without KV. Raises ValueError where it lies outside of the edit."""
        self._check(np.arange(start, end))
        self.slots[start:end] = NO_SLOT

    def commit(self, new_ids: IntArray) -> int:
        """Index the staged path under `new_ids` and take the old one away where nothing else uses it.

        What nothing holds any more is zeroed, also where only part of a page is hidden. Where `new_ids` are indexed
        already (another thread made the same edit), what is indexed stays and the staged pages are given back.

        Args:
            new_ids: as many as there are entries; they differ from the old ones, and only inside of the edit.

        Returns:
            Slots of the old path that became free.

        Raises:
            ValueError: `new_ids` are not of this form, or the edit is closed; nothing changes.
        """
        manager, start, old = self._manager, self._first * self._size, self.lease.ids
        self._check_key(new_ids, old, start)
        if np.array_equal(new_ids, old):
            self._close()
            return 0
        pages, state = self._pages()[self._first :], self._state[self._first :]
        manager.pool.retain(pages[(pages != NO_SLOT) & (state != _FRESH)])
        known = manager.index.insert(new_ids, self.slots, extra_key=self.lease.extra_key)
        stray = self.fresh_pages[~np.isin(self.fresh_pages, pages)]  # owned, then hidden
        manager.free(np.concatenate([stray, manager.pages_of(self.slots[start:known])]))
        self._close()
        freed = manager.drop(old, start, extra_key=self.lease.extra_key)
        self._wipe_hidden(known)
        return freed

    def abort(self) -> None:
        """Give the copies back; does nothing on a closed edit.

        The old path is intact, or gone from the first entry that was owned in place on.
        """
        if self._done:
            return
        self._manager.free(self.fresh_pages)
        self._close()
        if self._written_from < len(self._state):
            self._manager.drop(self.lease.ids, self._written_from * self._size, extra_key=self.lease.extra_key)

    def __enter__(self) -> PathEdit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _own_pages(self, key_pages: IntArray) -> None:
        key_pages = key_pages[self._state[key_pages] == _SHARED]
        if not len(key_pages):
            return
        pages = self._pages()[key_pages]
        alone = (key_pages * self._size >= self._exclusive_from) & (self._manager.pool.refcounts[pages] == 1)
        self._copy(key_pages[~alone], pages[~alone])
        self._state[key_pages[alone]] = _IN_PLACE
        self._written_from = min(self._written_from, *key_pages[alone].tolist(), len(self._state))

    def _copy(self, key_pages: IntArray, pages: IntArray) -> None:
        if not len(key_pages):
            return
        fresh = self._manager.alloc(len(key_pages))
        self._manager.pool.copy_pages(pages, fresh)
        rows = self.slots.reshape(-1, self._size)
        moved = fresh[:, None] * self._size + np.arange(self._size)
        rows[key_pages] = np.where(rows[key_pages] == NO_SLOT, NO_SLOT, moved)
        self._state[key_pages] = _FRESH
        self.fresh_pages = np.concatenate([self.fresh_pages, fresh])
        self.slots_copied += len(fresh) * self._size

    def _pages(self) -> IntArray:
        """The page of each key page, NO_SLOT where it is wholly hidden. Shape: (num_entries / page_size,)."""
        highest = self.slots.reshape(-1, self._size).max(axis=1)
        return np.where(highest == NO_SLOT, NO_SLOT, highest // self._size)

    def _wipe_hidden(self, known: int) -> None:
        """Zero the hidden entries of pages that the new path shares with nobody, from entry `known` on."""
        pool, pages = self._manager.pool, self._pages()[known // self._size :]
        alone = (pages != NO_SLOT) & (pool.refcounts[pages] == 1)
        hidden = self.slots[known:].reshape(-1, self._size) == NO_SLOT
        row, offset = np.nonzero(hidden & alone[:, None])
        pool.wipe(pages[row] * self._size + offset)

    def _check(self, index: IntArray) -> None:
        if self._done:
            raise ValueError("the edit is closed; open a new one")
        if len(index) and not (self._first * self._size <= index.min() and index.max() < self.num_entries):
            raise ValueError(
                f"the edit spans [{self._first * self._size}, {self.num_entries}), got entries from {index.min()} "
                f"to {index.max()}; open it at the first entry that it changes"
            )

    def _check_key(self, new_ids: IntArray, old: IntArray, start: int) -> None:
        if self._done:
            raise ValueError("the edit is closed; open a new one")
        if len(new_ids) != len(old):
            raise ValueError(f"an edit keeps its length: {len(old)} entries, got {len(new_ids)} new ids")
        if not np.array_equal(new_ids[:start], old[:start]):
            raise ValueError(f"ids before entry {start}, where the edit starts, must stay as they are")
        if np.array_equal(new_ids, old) and not np.array_equal(self.slots, self.lease.slots):
            raise ValueError("other slots need another key; put tombstones where spans were hidden or rewritten")

    def _close(self) -> None:
        self._done = True
        self.fresh_pages = np.empty(0, dtype=np.int64)
        self._manager.close_edit(self)
