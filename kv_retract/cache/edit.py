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
    nothing. A context manager: leaving it without `commit` aborts.

    Attributes:
        lease: the path as it is, locked.
        num_entries: its length.
        slots: the staged slots. Shape: (num_entries,)
        slots_copied: slots that had to be copied because others share them.
    """

    def __init__(self, manager: CacheManager, lease: Lease, exclusive_from: int, start: int) -> None:
        self.lease, self.num_entries, self.slots = lease, len(lease), lease.slots.copy()
        self.slots_copied = 0
        self._manager, self._size, self._exclusive_from = manager, manager.pool.page_size, exclusive_from
        self._first = start // self._size  # the first key page that the edit may change
        self._state = np.full(self.num_entries // self._size, _SHARED, dtype=np.int8)  # per key page
        self._done = False
        self.fresh_pages: IntArray = np.empty(0, dtype=np.int64)
        """Pages that the edit holds."""

    def own(self, index: IntArray) -> IntArray:
        """Make the slots of entries safe to write and return them.

        In place where nothing else uses the page, else in a copy of it.

        Raises:
            ValueError: an entry is hidden or lies before the edit.
            PoolExhaustedError: no room for the copies; nothing changes.
        """
        if np.any(self.slots[index] == NO_SLOT):
            raise ValueError("hidden entries have no slots to write")
        if len(index) and index.min() // self._size < self._first:
            raise ValueError(f"entry {index.min()} lies before the edit")
        touched = np.unique(index // self._size)
        touched = touched[self._state[touched] == _SHARED]
        pages = self._pages()[touched]
        alone = (touched * self._size >= self._exclusive_from) & (self._manager.pool.refcounts[pages] == 1)
        self._copy(touched[~alone], pages[~alone])
        self._state[touched[alone]] = _IN_PLACE
        return self.slots[index]

    def hide(self, start: int, end: int) -> None:
        """Leave `[start, end)` without KV."""
        self.slots[start:end] = NO_SLOT

    def commit(self, new_ids: IntArray) -> int:
        """Index the staged path under `new_ids` and take the old one away where nothing else uses it.

        What nothing holds any more is zeroed, also where only part of a page is hidden.

        Returns:
            Slots freed.
        """
        if len(new_ids) != self.num_entries:
            raise ValueError(f"an edit keeps its length: {self.num_entries} entries, got {len(new_ids)} new ids")
        manager, start = self._manager, self._first * self._size
        pages, used = self._pages()[self._first :], self._state[self._first :]
        visible = pages != NO_SLOT
        manager.pool.retain(pages[visible & (used != _FRESH)])
        stray = np.setdiff1d(self.fresh_pages, pages)  # owned, then hidden
        known = manager.index.insert(new_ids, self.slots, extra_key=self.lease.extra_key)
        manager.pool.release(manager.pages_of(self.slots[start:known]))
        gone = manager.pool.release(stray)
        self._close()
        freed = manager.drop(self.lease.ids, start, extra_key=self.lease.extra_key) + len(gone) * self._size
        self._wipe_hidden(pages)
        manager.pool.wipe(manager.pool.slots_of(gone))
        return freed

    def abort(self) -> None:
        """Give the copies back. The old path is intact, or gone from the first entry that was written in place on."""
        manager = self._manager
        manager.pool.release(self.fresh_pages)
        self._close()
        written = np.flatnonzero(self._state == _IN_PLACE)
        if len(written):
            manager.drop(self.lease.ids, int(written[0]) * self._size, extra_key=self.lease.extra_key)

    def __enter__(self) -> PathEdit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.abort()

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

    def _wipe_hidden(self, pages: IntArray) -> None:
        """Zero hidden entries that share one of the new path's pages with visible ones, if no other path reads it."""
        old = self.lease.slots
        hidden = old[(self.slots == NO_SLOT) & (old != NO_SLOT)]
        page = hidden // self._size
        self._manager.pool.wipe(hidden[np.isin(page, pages) & (self._manager.pool.refcounts[page] == 1)])

    def _close(self) -> None:
        self._done = True
        self.fresh_pages = np.empty(0, dtype=np.int64)
        self._manager.close_edit(self)
