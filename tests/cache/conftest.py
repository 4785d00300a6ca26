"""A cache that is checked against the oracle at every call, and a world of threads that use it.

`World.step` performs one random operation and then checks every conservation law. Both the Hypothesis state machine
and the seeded driver choose operations through it, so they share one definition of what is correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kv_retract.cache.base import NO_SLOT, IntArray, MatchResult, PrefixCache
from kv_retract.cache.keys import is_tombstone, tombstone_ids
from kv_retract.cache.lease import Lease
from kv_retract.cache.manager import CacheManager
from kv_retract.cache.naive import NaiveCache
from kv_retract.cache.pool import PagedKVPool
from kv_retract.cache.radix import Node, RadixCache
from kv_retract.errors import PoolExhaustedError

Choose = Callable[[int], int]
"""`choose(n)` picks one of `range(n)`."""


def array(values: object) -> IntArray:
    return np.array(values, dtype=np.int64)


def radix_paths(radix: RadixCache) -> set[tuple[str, tuple[int, ...]]]:
    """All page-aligned prefixes that the tree holds, in the oracle's form."""
    paths: set[tuple[str, tuple[int, ...]]] = set()
    stack: list[tuple[str, tuple[int, ...], Node]] = [
        (extra_key, (), child) for extra_key, root in radix._roots.items() for child in root.children.values()
    ]
    while stack:
        extra_key, before, node = stack.pop()
        ids = before + tuple(node.ids.tolist())
        paths.update(
            (extra_key, ids[:end]) for end in range(len(before) + radix.page_size, len(ids) + 1, radix.page_size)
        )
        stack.extend((extra_key, ids, child) for child in node.children.values())
    return paths


class CheckedCache(PrefixCache):
    """Runs a RadixCache and the oracle side by side; fails where they differ."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.radix, self.naive = RadixCache(page_size), NaiveCache(page_size)

    def match_prefix(self, ids: IntArray, *, extra_key: str = "") -> MatchResult:
        fast = self.radix.match_prefix(ids, extra_key=extra_key)
        slow = self.naive.match_prefix(ids, extra_key=extra_key)
        assert fast.slots.tolist() == slow.slots.tolist()
        return MatchResult(fast.slots, (fast.node, slow.node))

    def insert(self, ids: IntArray, slots: IntArray, *, extra_key: str = "") -> int:
        known = self.radix.insert(ids, slots, extra_key=extra_key)
        assert known == self.naive.insert(ids, slots, extra_key=extra_key)
        return known

    def evict(self, num_slots: int) -> IntArray:
        due = min(num_slots, self.radix.evictable_size)
        slots = self.radix.evict(num_slots)
        gone = set(self.naive.pages) - radix_paths(self.radix)
        self.naive.check_eviction(gone)
        expected = sorted(slot for path in gone for slot in self.naive.pages[path].slots)
        assert sorted(slots.tolist()) == expected, "evict must return what it dropped"
        assert np.count_nonzero(slots != NO_SLOT) >= due
        self.naive.forget(gone)
        return slots

    def inc_lock_ref(self, node: object) -> None:
        self.radix.inc_lock_ref(node[0])
        self.naive.inc_lock_ref(node[1])

    def dec_lock_ref(self, node: object) -> None:
        self.radix.dec_lock_ref(node[0])
        self.naive.dec_lock_ref(node[1])

    def exclusive_from(self, ids: IntArray, *, extra_key: str = "", locks: int = 0) -> int:
        fast = self.radix.exclusive_from(ids, extra_key=extra_key, locks=locks)
        assert fast == self.naive.exclusive_from(ids, extra_key=extra_key, locks=locks)
        return fast

    def remove_tail(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        fast = self.radix.remove_tail(ids, start, extra_key=extra_key)
        assert fast.tolist() == self.naive.remove_tail(ids, start, extra_key=extra_key).tolist()
        return fast

    def remove_branches(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        fast = self.radix.remove_branches(ids, start, extra_key=extra_key)
        slow = self.naive.remove_branches(ids, start, extra_key=extra_key)
        assert np.sort(fast).tolist() == np.sort(slow).tolist()
        return fast

    @property
    def evictable_size(self) -> int:
        return self.radix.evictable_size

    @property
    def protected_size(self) -> int:
        return self.radix.protected_size

    def paths(self) -> Iterator[tuple[str, IntArray, IntArray]]:
        fast, slow = (list(index.paths()) for index in (self.radix, self.naive))
        as_lists = [sorted((key, ids.tolist(), slots.tolist()) for key, ids, slots in found) for found in (fast, slow)]
        assert as_lists[0] == as_lists[1]
        return iter(fast)

    def held_slots(self) -> IntArray:
        return self.radix.held_slots()

    def check_integrity(self) -> None:
        self.radix.check_integrity()
        self.naive.check_integrity()
        assert radix_paths(self.radix) == set(self.naive.pages)
        assert np.sort(self.radix.held_slots()).tolist() == np.sort(self.naive.held_slots()).tolist()
        assert self.radix.evictable_size == self.naive.evictable_size
        assert self.radix.protected_size == self.naive.protected_size


@dataclass(eq=False)
class Running:
    """A lease and the contents that its entries must have; 0 where an entry is hidden."""

    lease: Lease
    contents: list[int]


class World:
    """Threads over one small cache. Every slot holds a number that only its writer could have put there.

    Attributes:
        contents: for each indexed page, in the oracle's form, the contents it must have.
        paths: keys that were used before, so that later operations meet them again.
    """

    NAMESPACES = ("", "tenant")

    def __init__(self, page_size: int, num_pages: int) -> None:
        self.size = page_size
        self.pool = PagedKVPool(
            num_layers=1, num_kv_heads=1, head_dim=1, num_pages=num_pages, page_size=page_size, dtype=torch.float64
        )
        self.index = CheckedCache(page_size)
        self.manager = CacheManager(self.pool, self.index)
        self.running: list[Running] = []
        self.locks: list[object] = []
        self.contents: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self.paths: list[tuple[str, IntArray]] = []
        self.counter = 0
        self.done: dict[str, int] = {}
        self.operations = (
            self.begin, self.begin, self.append, self.append, self.append, self.fork, self.publish, self.publish,
            self.end, self.end, self.edit, self.edit, self.edit, self.drop, self.evict, self.lock, self.unlock,
        )  # fmt: skip

        self.store(array([0, 1, 2, 0, 1, 2]))
        self.store(array([0, 1, 2, 1]))

    def store(self, ids: IntArray) -> None:
        """Begin with a thread that is cached already."""
        lease = self.manager.lease(ids)
        thread = Running(lease, self.indexed(lease.ids, ""))
        assert self.grow(thread, ids[lease.num_cached :]) is None
        self.manager.release(lease)
        self.note("", ids[: len(ids) // self.size * self.size], thread.contents)

    def step(self, choose: Choose) -> None:
        operation = self.operations[choose(len(self.operations))]
        name = operation(choose) or operation.__name__
        self.done[name] = self.done.get(name, 0) + 1
        self.check()

    # -- operations -------------------------------------------------------------------------------------------------

    def begin(self, choose: Choose) -> str | None:
        if len(self.running) >= 5:
            return "idle"
        extra_key, known = self.paths[choose(len(self.paths))]
        if choose(8) == 0:
            extra_key = self.NAMESPACES[choose(len(self.NAMESPACES))]
        ids = np.concatenate([known[: choose(len(known) + 1)], array([choose(3) for _ in range(choose(9))])])
        lease = self.manager.lease(ids, extra_key=extra_key)
        assert lease.ids.tolist() == ids[: lease.num_cached].tolist()
        thread = Running(lease, self.indexed(lease.ids, extra_key))
        self.running.append(thread)
        cold = ids[lease.num_cached :]
        cold = cold[: int(is_tombstone(cold).argmax())] if is_tombstone(cold).any() else cold
        return self.grow(thread, cold)

    def append(self, choose: Choose) -> str | None:
        thread = self.pick(choose)
        return self.grow(thread, array([choose(3) for _ in range(1 + choose(6))])) if thread else "idle"

    def fork(self, choose: Choose) -> str | None:
        thread = self.pick(choose)
        if thread is None or len(self.running) >= 5:
            return "idle"
        free = self.pool.num_free
        self.running.append(Running(self.manager.fork(thread.lease), list(thread.contents)))
        assert self.pool.num_free == free, "a fork copies nothing"
        return None

    def publish(self, choose: Choose) -> str | None:
        thread = self.pick(choose)
        if thread is None:
            return "idle"
        self.manager.publish(thread.lease)
        end = len(thread.lease) // self.size * self.size
        self.note(thread.lease.extra_key, thread.lease.ids[:end], thread.contents)
        thread.contents[:end] = self.indexed(thread.lease.ids[:end], thread.lease.extra_key)
        assert thread.lease.private_from == end
        return None

    def end(self, choose: Choose) -> str | None:
        thread = self.pick(choose)
        if thread is None:
            return "idle"
        lease, ids = thread.lease, thread.lease.ids.copy()
        keep = choose(len(ids) + 1) if choose(3) == 0 else None
        self.manager.release(lease, keep=keep)
        self.manager.release(lease)  # idempotent
        self.running.remove(thread)
        end = (len(ids) if keep is None else max(keep, lease.private_from)) // self.size * self.size
        self.note(lease.extra_key, ids[:end], thread.contents)
        assert self.manager.match(ids[:end], extra_key=lease.extra_key) == end
        return None

    def edit(self, choose: Choose) -> str | None:
        extra_key, ids = self.paths[choose(len(self.paths))]
        spans = self.spans(choose, len(ids))
        if not spans:
            return "idle"
        start = spans[0][0]
        edit = self.manager.open_edit(ids, extra_key=extra_key, start=start)
        staged = self.indexed(edit.lease.ids, extra_key)
        spans = [span for span in spans if span[1] <= edit.num_entries]
        outcome = "abort"
        with edit:
            try:
                for first, last in spans:
                    self.edit_span(edit, staged, first, last, choose)
                if choose(3) == 0:  # an eraser that also writes entries outside of the spans
                    self.rewrite(edit, staged, np.arange(start, edit.num_entries)[:: 1 + choose(3)])
            except PoolExhaustedError:
                assert self.index.evictable_size == 0
                outcome = "edit without room"
            else:
                if spans and choose(4) < 3:
                    new_ids, label = ids[: edit.num_entries].copy(), f"e{choose(2)}"
                    for first, last in spans:
                        new_ids[first:last] = tombstone_ids(ids[first:last], label, "r")
                    self.sync()
                    self.commit(edit, new_ids, staged)
                    outcome = "commit"
        return outcome

    def drop(self, choose: Choose) -> str | None:
        extra_key, ids = self.paths[choose(len(self.paths))]
        in_use = self.manager.tokens_in_use()
        forget, name = (self.manager.drop, None) if choose(4) else (self.manager.purge, "purge")
        freed = forget(ids, choose(len(ids) + 1), extra_key=extra_key)
        assert in_use - self.manager.tokens_in_use() == freed
        return name

    def evict(self, choose: Choose) -> str | None:
        slots = self.index.evict(1 + choose(8))
        self.manager.free(self.manager.pages_of(slots))
        return None

    def lock(self, choose: Choose) -> str | None:
        if len(self.locks) >= 3:
            return "idle"
        extra_key, ids = self.paths[choose(len(self.paths))]
        self.locks.append(self.index.match_prefix(ids, extra_key=extra_key).node)
        self.index.inc_lock_ref(self.locks[-1])
        return None

    def unlock(self, choose: Choose) -> str | None:
        if not self.locks:
            return "idle"
        self.index.dec_lock_ref(self.locks.pop(choose(len(self.locks))))
        return None

    # -- parts of operations ----------------------------------------------------------------------------------------

    def pick(self, choose: Choose) -> Running | None:
        return self.running[choose(len(self.running))] if self.running else None

    def grow(self, thread: Running, ids: IntArray) -> str | None:
        lease, before = thread.lease, (thread.lease.ids.tolist(), thread.lease.slots.tolist())
        try:
            slots = self.manager.append(lease, ids)
        except PoolExhaustedError:
            assert self.index.evictable_size == 0, "there was something left to evict"
            assert (lease.ids.tolist(), lease.slots.tolist()) == before
            return "append without room"
        assert lease.ids.tolist() == before[0] + ids.tolist()
        assert lease.slots[len(before[0]) :].tolist() == slots.tolist()
        numbers = self.numbers(len(ids))
        self.write(slots, numbers)
        thread.contents += numbers
        self.use(lease.extra_key, lease.ids.copy())
        return None

    def spans(self, choose: Choose, length: int) -> list[tuple[int, int]]:
        """One or two spans inside `[0, length)`."""
        spans, at = [], 0
        for _ in range(1 + choose(2)):
            if at < length:
                first = at + choose(length - at)
                at = first + 1 + choose(min(5, length - first))
                spans.append((first, at))
        return spans

    def edit_span(self, edit: object, staged: list[int], first: int, last: int, choose: Choose) -> None:
        action = choose(4)
        if action == 0:
            edit.hide(first, last)
            staged[first:last] = [0] * (last - first)
        elif action == 1:
            self.rewrite(edit, staged, np.arange(first, last))
        elif action == 2:
            self.rewrite(edit, staged, np.arange(first, last))
            edit.hide(first, last)
            staged[first:last] = [0] * (last - first)
            hidden = np.arange(first, last)[:: 1 + choose(2)]
            slots, numbers = edit.allocate(hidden), self.numbers(len(hidden))
            assert not self.read(slots).any(), "allocated slots are zeroed"
            self.write(slots, numbers)
            for entry, number in zip(hidden, numbers, strict=True):
                staged[entry] = number

    def rewrite(self, edit: object, staged: list[int], entries: IntArray) -> None:
        entries = entries[edit.slots[entries] != NO_SLOT]
        numbers = self.numbers(len(entries))
        self.write(edit.own(entries), numbers)
        for entry, number in zip(entries, numbers, strict=True):
            staged[entry] = number

    def commit(self, edit: object, new_ids: IntArray, staged: list[int]) -> None:
        extra_key, in_use = edit.lease.extra_key, self.manager.tokens_in_use()
        freed = edit.commit(new_ids)
        assert in_use - self.manager.tokens_in_use() >= freed
        self.note(extra_key, new_ids, staged)
        assert self.manager.match(new_ids, extra_key=extra_key) == edit.num_entries
        self.use(extra_key, new_ids)

    # -- what must be true ------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.sync()
        self.manager.check_integrity()
        assert self.contents.keys() == self.index.naive.pages.keys()
        for path, page in self.index.naive.pages.items():
            self.check_contents(array(page.slots), self.contents[path])
        for thread in self.running:
            self.check_contents(thread.lease.slots, thread.contents)
        self.check_locks()
        free = np.flatnonzero(self.pool.refcounts == 0)
        assert not self.read(self.pool.slots_of(free)).any(), "a free page still holds KV"

    def check_locks(self) -> None:
        """Every page is locked once per running sequence and once per lock that covers it, no more."""
        held = [node[1] for node in self.locks]
        held += [(t.lease.extra_key, tuple(t.lease.ids[: t.lease.private_from].tolist())) for t in self.running]
        for (extra_key, ids), page in self.index.naive.pages.items():
            covering = sum(name == extra_key and path[: len(ids)] == ids for name, path in held)
            assert page.lock_ref == covering, "a lock was lost or leaked"

    def check_contents(self, slots: IntArray, contents: list[int]) -> None:
        expected = array(contents)
        visible = slots != NO_SLOT
        assert (expected != 0).tolist() == visible.tolist()
        assert self.read(slots[visible]).tolist() == expected[visible].tolist()

    def sync(self) -> None:
        """Forget the contents of what has been dropped from the index."""
        for path in self.contents.keys() - self.index.naive.pages.keys():
            del self.contents[path]

    def note(self, extra_key: str, ids: IntArray, contents: list[int]) -> None:
        """Remember the contents of the pages of a path that were not indexed before."""
        self.sync()
        for end in range(self.size, len(ids) + 1, self.size):
            path = (extra_key, tuple(ids[:end].tolist()))
            self.contents.setdefault(path, contents[end - self.size : end])

    def indexed(self, ids: IntArray, extra_key: str) -> list[int]:
        self.sync()
        ends = range(self.size, len(ids) + 1, self.size)
        return [number for end in ends for number in self.contents[extra_key, tuple(ids[:end].tolist())]]

    def use(self, extra_key: str, ids: IntArray) -> None:
        self.paths = [*self.paths[-11:], (extra_key, ids[:40])]

    def numbers(self, count: int) -> list[int]:
        self.counter += count
        return list(range(self.counter - count + 1, self.counter + 1))

    def write(self, slots: IntArray, numbers: list[int]) -> None:
        k = torch.tensor(numbers, dtype=torch.float64).reshape(1, -1, 1, 1)
        self.pool.write(slots, k, -k)

    def read(self, slots: IntArray) -> IntArray:
        k, v = self.pool.read(slots)
        assert torch.equal(k, -v)
        return k.reshape(-1).numpy().astype(np.int64)


@pytest.fixture
def make_world() -> type[World]:
    return World


@pytest.fixture
def checked_cache() -> type[CheckedCache]:
    return CheckedCache
