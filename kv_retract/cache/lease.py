"""One running sequence: a locked cached prefix and private pages behind it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import IntArray


class Lease:
    """Ids and slots of a running sequence; made and changed by `CacheManager` only.

    Entries before `private_from` belong to the index and are locked; the pages behind it are held by the lease.

    Attributes:
        extra_key: namespace.
        num_cached: entries that were cached when the lease began.
        private_from: a multiple of the page size.
        node: the locked node of the index.
    """

    def __init__(self, extra_key: str, node: Any, ids: IntArray, slots: IntArray, page_size: int) -> None:
        self.extra_key, self.node = extra_key, node
        self.num_cached = self.private_from = self._length = len(ids)
        self._size = page_size
        self._ids, self._slots = ids.copy(), slots.copy()

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> IntArray:
        """Ids so far; a view that is valid until the lease grows."""
        return self._ids[: self._length]

    @property
    def slots(self) -> IntArray:
        """Slots so far, NO_SLOT for hidden tombstones; a view that is valid until the lease grows."""
        return self._slots[: self._length]

    @property
    def tail_page(self) -> int | None:
        """The partly filled page at the end; None where there is none."""
        return int(self._slots[self._length - 1]) // self._size if self._length % self._size else None

    def private_pages(self, start: int | None = None) -> IntArray:
        """Pages that the lease holds, at or after entry `start` (a multiple of the page size)."""
        pages: IntArray = self.slots[self.private_from if start is None else start :: self._size] // self._size
        return pages

    def extend(self, ids: IntArray, pages: IntArray) -> IntArray:
        """Add entries: the rest of the tail page, then `pages`. Returns their slots."""
        start, end = self._length, self._length + len(ids)
        self._reserve(end)
        entries = np.arange(start, end)
        held = [] if self.tail_page is None else [self.tail_page]
        page = np.concatenate([np.array(held, dtype=np.int64), pages])[entries // self._size - start // self._size]
        self._ids[start:end] = ids
        self._slots[start:end] = page * self._size + entries % self._size
        self._length = end
        return self._slots[start:end].copy()

    def replace_tail(self, page: int) -> None:
        """Let the entries of the tail page live in another page."""
        start = self._length // self._size * self._size
        self._slots[start : self._length] = page * self._size + np.arange(self._length - start)

    def rebase(self, node: Any, slots: IntArray) -> None:
        """Let the index own the first `len(slots)` entries."""
        self.node, self.private_from = node, len(slots)
        self._slots[: len(slots)] = slots

    def copy(self) -> Lease:
        """Return a twin with the same entries."""
        twin = Lease(self.extra_key, self.node, self.ids, self.slots, self._size)
        twin.num_cached, twin.private_from = self.num_cached, self.private_from
        return twin

    def _reserve(self, length: int) -> None:
        if length > len(self._ids):
            capacity = max(length, 2 * len(self._ids))
            for name in ("_ids", "_slots"):
                grown = np.empty(capacity, dtype=np.int64)
                grown[: self._length] = getattr(self, name)[: self._length]
                setattr(self, name, grown)
