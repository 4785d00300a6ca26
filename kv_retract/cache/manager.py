"""Joins pool and prefix index: running sequences, sharing between threads, and edits of cached paths.

Page references: one per key page that the index holds, one per private page of a lease, one per fresh page of an
edit. Not thread-safe by itself: the engine calls it under a lock.
"""

from __future__ import annotations

import numpy as np

from ..errors import CacheIntegrityError, PoolExhaustedError
from .base import NO_SLOT, IntArray, PrefixCache
from .edit import PathEdit
from .lease import Lease
from .pool import PagedKVPool


class CacheManager:
    """The KV cache of one engine.

    Args:
        pool: tensors and page references.
        index: which pages hold which prefix; must use the pool's page size.
    """

    def __init__(self, pool: PagedKVPool, index: PrefixCache) -> None:
        if pool.page_size != index.page_size:
            raise ValueError(f"pool and index must agree on the page size, got {pool.page_size} and {index.page_size}")
        self.pool, self.index = pool, index
        self._leases: set[Lease] = set()
        self._first: dict[int, Lease] = {}  # by the identity of the node that it locks, and so keeps
        self._edits: set[PathEdit] = set()

    def match(self, ids: IntArray, *, extra_key: str = "") -> int:
        """Return how many leading entries are cached, and count it as a use."""
        return len(self.index.match_prefix(ids, extra_key=extra_key).slots)

    # -- running sequences ------------------------------------------------------------------------------------------

    def lease(self, ids: IntArray, *, extra_key: str = "") -> Lease:
        """Begin a sequence with the longest cached prefix of `ids`, locked until `release`."""
        match = self.index.match_prefix(ids, extra_key=extra_key)
        self.index.inc_lock_ref(match.node)
        like = self._first.get(id(match.node))
        size = self.pool.page_size
        lease = Lease(extra_key, match.node, ids[: len(match.slots)], match.slots, size, like=like)
        if like is None and len(lease):
            self._first[id(match.node)] = lease
        self._leases.add(lease)
        return lease

    def append(self, lease: Lease, ids: IntArray) -> IntArray:
        """Give a sequence slots for new tokens at its end.

        A tail page that a fork shares is copied first. Evicts unlocked threads where the pool is full.

        Returns:
            The new slots. Shape: (len(ids),)

        Raises:
            PoolExhaustedError: no room even after eviction; the lease is unchanged.
        """
        self._check_open(lease)
        size, length = self.pool.page_size, len(lease)
        tail = lease.tail_page
        shared_tail = tail is not None and self.pool.refcounts[tail] > 1
        pages = self.alloc(-(-(length + len(ids)) // size) - -(-length // size) + int(shared_tail))
        if shared_tail:
            self.pool.copy_pages(np.array([tail]), pages[:1])
            self.free(np.array([tail]))
            lease.replace_tail(int(pages[0]))
            pages = pages[1:]
        return lease.extend(ids, pages)

    def publish(self, lease: Lease) -> None:
        """Index what a sequence holds so far, so that others can share it, and go on."""
        self._check_open(lease)
        end = len(lease) // self.pool.page_size * self.pool.page_size
        self._index(lease, end)
        match = self.index.match_prefix(lease.ids[:end], extra_key=lease.extra_key)
        self.index.inc_lock_ref(match.node)
        self.index.dec_lock_ref(lease.node)
        self._forget_first(lease)
        lease.rebase(match.node, match.slots)

    def release(self, lease: Lease, *, keep: int | None = None) -> None:
        """End a sequence: index its first `keep` entries (default all), give back the rest. Idempotent."""
        if lease not in self._leases:
            return
        keep = len(lease) if keep is None else min(keep, len(lease))
        end = max(keep // self.pool.page_size * self.pool.page_size, lease.private_from)
        self._index(lease, end)
        self.free(lease.private_pages(end))
        self.index.dec_lock_ref(lease.node)
        self._forget_first(lease)
        self._leases.remove(lease)

    def fork(self, lease: Lease) -> Lease:
        """Begin a second sequence on the same pages. Copies nothing until one of them writes into a shared page."""
        self._check_open(lease)
        twin = lease.copy()
        self.index.inc_lock_ref(twin.node)
        self.pool.retain(twin.private_pages())
        self._leases.add(twin)
        return twin

    # -- edits ------------------------------------------------------------------------------------------------------

    def open_edit(self, ids: IntArray, *, extra_key: str = "", start: int) -> PathEdit:
        """Open the cached part of `ids` for an edit from entry `start` on; see `PathEdit`."""
        lease = self.lease(ids, extra_key=extra_key)
        exclusive = self.index.exclusive_from(lease.ids, extra_key=extra_key, locks=1)
        edit = PathEdit(self, lease, exclusive, start)
        self._edits.add(edit)
        return edit

    def close_edit(self, edit: PathEdit) -> None:
        """Forget an edit that has committed or aborted; for `PathEdit` only."""
        self._edits.discard(edit)
        self.release(edit.lease, keep=edit.lease.num_cached)

    def drop(self, ids: IntArray, start: int, *, extra_key: str = "") -> int:
        """Forget what only the path `ids` uses, from entry `start` on; zero it; return the slots freed.

        `start` inside a page takes the whole page: it holds entries to be forgotten.
        """
        return self.free(self.pages_of(self.index.remove_tail(ids, start, extra_key=extra_key)))

    def purge(self, ids: IntArray, start: int, *, extra_key: str = "") -> int:
        """As `drop`, and forget also what other paths hold that go through entry `start`, unless it is running."""
        return self.free(self.pages_of(self.index.remove_branches(ids, start, extra_key=extra_key)))

    # -- pages ------------------------------------------------------------------------------------------------------

    def alloc(self, num_pages: int) -> IntArray:
        """Take pages from the pool, evicting as needed; raises PoolExhaustedError."""
        while self.pool.num_free < num_pages:
            evicted = self.index.evict((num_pages - self.pool.num_free) * self.pool.page_size)
            if not len(evicted):
                break
            self.free(self.pages_of(evicted))
        try:
            return self.pool.alloc(num_pages)
        except PoolExhaustedError as error:
            in_use = self.index.protected_size
            raise PoolExhaustedError(f"{error} ({in_use} cached tokens are locked by running threads)") from None

    def free(self, pages: IntArray) -> int:
        """Hold pages once less and zero those that nobody holds any more, so that no retracted text stays behind.

        Returns:
            Slots that became free.
        """
        freed = self.pool.release(pages)
        if len(freed):
            self.pool.wipe(self.pool.slots_of(freed))
        return len(freed) * self.pool.page_size

    def pages_of(self, slots: IntArray) -> IntArray:
        """Return the page of each key page of an aligned run of slots; key pages without KV are left out."""
        highest = slots.reshape(-1, self.pool.page_size).max(axis=1)
        pages: IntArray = highest[highest != NO_SLOT] // self.pool.page_size
        return pages

    # -- accounts ---------------------------------------------------------------------------------------------------

    def pages_in_use(self) -> int:
        """Pages that somebody holds."""
        return self.pool.num_pages - self.pool.num_free

    def tokens_in_use(self) -> int:
        """Slots of those pages."""
        return self.pages_in_use() * self.pool.page_size

    def check_integrity(self) -> None:
        """Raise CacheIntegrityError where a slot is lost, shared without a reference, or leaked."""
        self.index.check_integrity()
        held, size = self.index.held_slots(), self.pool.page_size
        rows = held.reshape(-1, size)
        misplaced = (rows != NO_SLOT) & (rows != rows.max(axis=1, keepdims=True) // size * size + np.arange(size))
        if misplaced.any():
            raise CacheIntegrityError("a key page holds slots of several pages, or out of their order")
        references = [self.pages_of(held), *(lease.private_pages() for lease in self._leases)]
        references += [edit.fresh_pages for edit in self._edits]
        counted = np.bincount(np.concatenate(references), minlength=self.pool.num_pages)
        wrong = np.flatnonzero(counted != self.pool.refcounts)
        if len(wrong):
            page = int(wrong[0])
            raise CacheIntegrityError(
                f"{len(wrong)} pages are miscounted: page {page} is held {counted[page]} times, "
                f"the pool counts {self.pool.refcounts[page]}"
            )
        self.pool.check_integrity()
        for lease in self._leases:
            visible = lease.slots[lease.slots != NO_SLOT]
            if len(np.unique(visible)) < len(visible):
                raise CacheIntegrityError("a running sequence uses one slot at two positions")

    def _index(self, lease: Lease, end: int) -> None:
        """Hand the first `end` entries of a lease to the index; pages it knew already by other slots are released."""
        if end <= lease.private_from:
            return
        known = self.index.insert(lease.ids[:end], lease.slots[:end], extra_key=lease.extra_key)
        duplicates = lease.slots[lease.private_from : min(max(known, lease.private_from), end)]
        self.free(self.pages_of(duplicates))

    def _forget_first(self, lease: Lease) -> None:
        if self._first.get(id(lease.node)) is lease:
            del self._first[id(lease.node)]

    def _check_open(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise ValueError("the lease has been released; take a new one")
