"""One running sequence: a locked cached prefix and private pages behind it."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np

from .base import IntArray


class Lease:
    """Ids and slots of a running sequence; made and changed by `CacheManager` only.

    Entries before `private_from` belong to the index and are locked; the pages behind it are held by the lease. What a
    sequence began with, or had when it was forked, is kept once for all its forks.

    Attributes:
        extra_key: namespace.
        num_cached: entries that were cached when the lease began.
        private_from: a multiple of the page size.
        node: the locked node of the index.
    """

    def __init__(
        self, extra_key: str, node: Any, ids: IntArray, slots: IntArray, page_size: int, *, like: Lease | None = None
    ) -> None:
        """Begin with a cached path, or with what `like`, that began with the same one, keeps of it."""
        self.extra_key, self.node = extra_key, node
        self.num_cached = self.private_from = len(ids)
        self._size = page_size
        self._head: IntArray = np.stack([ids, slots]) if like is None else like._head[:, : len(ids)]  # never written
        self._tail, self._grown = np.empty((2, 0), dtype=np.int64), 0

    def __len__(self) -> int:
        length: int = self._head.shape[1] + self._grown
        return length

    @property
    def ids(self) -> IntArray:
        """Ids so far, until the lease grows; not to be written."""
        return self._row(0)

    @property
    def slots(self) -> IntArray:
        """Slots so far, until the lease grows; NO_SLOT for hidden tombstones. Not to be written."""
        return self._row(1)

    @property
    def tail_page(self) -> int | None:
        """The partly filled page at the end; None where there is none."""
        if not len(self) % self._size:
            return None
        last: int = self._tail[1, self._grown - 1] if self._grown else self._head[1, -1]
        return int(last) // self._size

    def private_pages(self, start: int | None = None) -> IntArray:
        """Pages that the lease holds, at or after entry `start` (a multiple of the page size)."""
        pages: IntArray = self.slots[self.private_from if start is None else start :: self._size] // self._size
        return pages

    def extend(self, ids: IntArray, pages: IntArray) -> IntArray:
        """Add entries: the rest of the tail page, then `pages`. Returns their slots."""
        start, end = len(self), len(self) + len(ids)
        entries = np.arange(start, end)
        held = [] if self.tail_page is None else [self.tail_page]
        page = np.concatenate([np.array(held, dtype=np.int64), pages])[entries // self._size - start // self._size]
        slots: IntArray = page * self._size + entries % self._size
        self._grow(np.stack([ids, slots]))
        return slots

    def put(self, entry: int, token: int) -> None:
        """Say which token an entry at the end holds, that was added before it was known."""
        self._tail[0, entry - self._head.shape[1]] = token

    def replace_tail(self, page: int) -> None:
        """Let the entries of the tail page live in another page."""
        length = len(self)
        start = length // self._size * self._size
        self._split(min(start, self._head.shape[1]))
        at = start - self._head.shape[1]
        self._tail[1, at : self._grown] = page * self._size + np.arange(length - start)

    def rebase(self, node: Any, slots: IntArray) -> None:
        """Let the index own the first `len(slots)` entries."""
        self.node, self.private_from = node, len(slots)
        whole = np.stack([self.ids, self.slots])
        whole[1, : len(slots)] = slots
        self._head, self._grown = whole, 0

    def copy(self) -> Lease:
        """Return a twin with the same entries."""
        if self._grown:
            self._head, self._grown = np.stack([self.ids, self.slots]), 0
        twin = copy(self)
        twin._tail = np.empty((2, 0), dtype=np.int64)
        return twin

    def _row(self, which: int) -> IntArray:
        row: IntArray = self._head[which]
        return np.concatenate([row, self._tail[which, : self._grown]]) if self._grown else row

    def _split(self, end: int) -> None:
        """Make everything from entry `end` of the head on this lease's own."""
        moved = self._head[:, end:]
        if moved.shape[1]:
            own = np.concatenate([moved, self._tail[:, : self._grown]], axis=1)
            self._head, self._tail, self._grown = self._head[:, :end], own, own.shape[1]

    def _grow(self, new: IntArray) -> None:
        end = self._grown + new.shape[1]
        if end > self._tail.shape[1]:
            grown = np.empty((2, max(end, 2 * self._grown)), dtype=np.int64)
            grown[:, : self._grown] = self._tail[:, : self._grown]
            self._tail = grown
        self._tail[:, self._grown : end] = new
        self._grown = end
