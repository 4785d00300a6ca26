"""Edits of a cached path: in place where it is alone, copied where it is shared, atomic always."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kv_retract.cache.base import NO_SLOT
from kv_retract.cache.keys import tombstone_ids
from kv_retract.cache.manager import CacheManager
from kv_retract.cache.pool import PagedKVPool
from kv_retract.cache.radix import RadixCache
from kv_retract.errors import PoolExhaustedError

PAGE_SIZES = [1, 4, 16]


class Cache:
    """A manager and one stored path of six pages, entry `i` holding the value `i + 1`."""

    def __init__(self, page_size: int, num_pages: int = 32) -> None:
        pool = PagedKVPool(num_layers=1, num_kv_heads=1, head_dim=1, num_pages=num_pages, page_size=page_size)
        self.manager, self.size = CacheManager(pool, RadixCache(page_size=page_size)), page_size
        self.ids = np.arange(6 * page_size, dtype=np.int64)
        lease = self.manager.lease(self.ids)
        self.write(self.manager.append(lease, self.ids), self.ids + 1)
        self.manager.release(lease)

    def write(self, slots: np.ndarray, values: np.ndarray) -> None:
        k = torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(1, -1, 1, 1)
        self.manager.pool.write(slots, k, -k)

    def values(self, ids: np.ndarray) -> list[float]:
        """Contents of the cached part of a path, 0 where hidden."""
        lease = self.manager.lease(ids)
        slots = lease.slots.copy()
        self.manager.release(lease)
        k, _ = self.manager.pool.read(np.maximum(slots, 0))
        return np.where(slots == NO_SLOT, 0, k.reshape(-1).numpy()).tolist()

    def key(self, start: int, end: int, label: str = "e") -> np.ndarray:
        ids = self.ids.copy()
        ids[start:end] = tombstone_ids(ids[start:end], label, "r")
        return ids

    def add_branch(self) -> np.ndarray:
        """Let another thread share the first five pages and go its own way."""
        ids = self.ids.copy()
        ids[5 * self.size :] += 1000
        lease = self.manager.lease(ids)
        self.write(self.manager.append(lease, ids[lease.num_cached :]), ids[lease.num_cached :] + 1)
        self.manager.release(lease)
        return ids

    def edit(self, start: int, end: int, value: float = -5.0, label: str = "e") -> tuple[np.ndarray, int, int]:
        """Rewrite a span; returns the new key, slots freed, slots copied."""
        with self.manager.open_edit(self.ids, start=start) as edit:
            index = np.arange(start, end)
            self.write(edit.own(index), np.full(len(index), value))
            key = self.key(start, end, label)
            freed = edit.commit(key)
        return key, freed, edit.slots_copied


@pytest.fixture(params=PAGE_SIZES)
def cache(request):
    cache = Cache(request.param)
    yield cache
    cache.manager.check_integrity()


def test_an_exclusive_path_is_edited_in_place(cache):
    n, used = cache.size, cache.manager.tokens_in_use()
    key, freed, copied = cache.edit(2 * n, 3 * n)
    assert (freed, copied, cache.manager.tokens_in_use()) == (0, 0, used)
    assert cache.values(key) == [*range(1, 2 * n + 1), *[-5.0] * n, *range(3 * n + 1, 6 * n + 1)]
    assert cache.manager.match(cache.ids) == 2 * n, "the original text no longer matches"


def test_a_shared_path_is_copied_and_the_other_thread_sees_nothing(cache):
    n = cache.size
    other = cache.add_branch()
    before, used = cache.values(other), cache.manager.tokens_in_use()
    key, freed, copied = cache.edit(2 * n, 3 * n)
    assert copied == n and cache.manager.tokens_in_use() == used + n
    assert cache.values(other) == before
    assert cache.values(key)[2 * n : 4 * n] == [*[-5.0] * n, *range(3 * n + 1, 4 * n + 1)]
    assert cache.manager.match(cache.ids) == 5 * n, "the shared part stays, its own tail moved to the new key"


def test_a_running_sequence_keeps_what_it_reads(cache):
    n = cache.size
    running = cache.manager.lease(cache.ids)
    _, _, copied = cache.edit(2 * n, 3 * n)
    assert copied == n
    k, _ = cache.manager.pool.read(running.slots)
    assert k.reshape(-1).tolist() == list(range(1, 6 * n + 1))
    cache.manager.release(running)


def test_a_hidden_span_is_freed_and_zeroed(cache):
    n = cache.size
    with cache.manager.open_edit(cache.ids, start=n) as edit:
        slots = edit.slots[n : 3 * n].copy()
        edit.hide(n, 3 * n)
        assert edit.commit(cache.key(n, 3 * n)) == 2 * n
    assert cache.manager.tokens_in_use() == 4 * n
    assert not cache.manager.pool.read(slots)[0].any()
    assert cache.values(cache.key(n, 3 * n)) == [*range(1, n + 1), *[0.0] * 2 * n, *range(3 * n + 1, 6 * n + 1)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("page_size", [4, 16])
def test_part_of_a_page_can_be_hidden(page_size, shared):
    cache = Cache(page_size)
    if shared:
        other = cache.add_branch()
        before = cache.values(other)
    start, end = page_size + 1, page_size + 3
    with cache.manager.open_edit(cache.ids, start=start) as edit:
        edit.own(np.array([start - 1]))  # the page must be private before its hidden part can be zeroed
        edit.hide(start, end)
        edit.commit(cache.key(start, end))
        slots = edit.slots[start - 1] + np.array([1, 2])
    assert not cache.manager.pool.read(slots)[0].any(), "no KV of the hidden part stays in the page"
    expected = list(range(1, 6 * page_size + 1))
    expected[start:end] = [0] * 2
    assert cache.values(cache.key(start, end)) == expected
    if shared:
        assert cache.values(other) == before
    cache.manager.check_integrity()


def test_hidden_entries_can_be_given_slots_again(cache):
    n = cache.size
    with cache.manager.open_edit(cache.ids, start=n) as edit:
        edit.hide(n, 3 * n)
        index = np.arange(2 * n - 1, 3 * n)
        slots = edit.allocate(index)
        assert not cache.manager.pool.read(slots)[0].any()
        cache.write(slots, np.full(len(index), 8.0))
        edit.commit(cache.key(n, 3 * n))
    assert cache.values(cache.key(n, 3 * n))[n : 3 * n] == [*[0.0] * (n - 1), *[8.0] * (n + 1)]


def test_two_spans_are_one_edit(cache):
    n = cache.size
    key = cache.key(n, 2 * n)
    key[4 * n : 5 * n] = tombstone_ids(cache.ids[4 * n : 5 * n], "e", "other")
    with cache.manager.open_edit(cache.ids, start=n) as edit:
        edit.hide(n, 2 * n)
        cache.write(edit.own(np.arange(4 * n, 5 * n)), np.full(n, 7.0))
        edit.commit(key)
    assert cache.values(key)[n : 5 * n] == [*[0.0] * n, *range(2 * n + 1, 4 * n + 1), *[7.0] * n]


def test_an_identical_edit_of_a_fork_is_stored_once(cache):
    n = cache.size
    running = cache.manager.lease(cache.ids)  # keeps the old path alive
    key, _, _ = cache.edit(2 * n, 3 * n)
    used = cache.manager.tokens_in_use()
    second, _, copied = cache.edit(2 * n, 3 * n)
    assert second.tolist() == key.tolist() and copied == n
    assert cache.manager.tokens_in_use() == used
    cache.manager.release(running)


def test_an_edit_can_be_edited(cache):
    n = cache.size
    cache.ids, _, _ = cache.edit(n, 2 * n, -1.0)
    key, _, copied = cache.edit(3 * n, 4 * n, -2.0)
    assert copied == 0
    assert cache.values(key)[n : 4 * n] == [*[-1.0] * n, *range(2 * n + 1, 3 * n + 1), *[-2.0] * n]


def test_aborting_before_the_first_write_changes_nothing(cache):
    before = cache.values(cache.ids)
    with cache.manager.open_edit(cache.ids, start=0) as edit:
        edit.hide(0, cache.size)
    edit.abort()
    assert cache.values(cache.ids) == before


def test_aborting_after_a_copy_changes_nothing_and_returns_the_copy(cache):
    cache.add_branch()
    before, used = cache.values(cache.ids), cache.manager.tokens_in_use()
    with pytest.raises(RuntimeError, match="boom"), cache.manager.open_edit(cache.ids, start=0) as edit:
        cache.write(edit.own(np.arange(cache.size)), np.zeros(cache.size))
        raise RuntimeError("boom")
    assert cache.values(cache.ids) == before and cache.manager.tokens_in_use() == used


def test_aborting_after_a_write_in_place_forgets_from_there(cache):
    n = cache.size
    with pytest.raises(RuntimeError, match="boom"), cache.manager.open_edit(cache.ids, start=0) as edit:
        cache.write(edit.own(np.arange(3 * n, 4 * n)), np.full(n, 99.0))
        edit.hide(3 * n, 4 * n)
        raise RuntimeError("boom")
    assert cache.values(cache.ids) == list(range(1, 3 * n + 1))
    assert cache.manager.tokens_in_use() == 3 * n


def test_no_room_for_a_copy_leaves_the_old_path():
    cache = Cache(page_size=1, num_pages=7)
    cache.add_branch()
    before = cache.values(cache.ids)
    with pytest.raises(PoolExhaustedError), cache.manager.open_edit(cache.ids, start=0) as edit:
        edit.own(np.arange(5))
    assert cache.values(cache.ids) == before
    cache.manager.check_integrity()


def test_only_what_is_cached_can_be_edited(cache):
    longer = np.concatenate([cache.ids, cache.ids + 500])
    with cache.manager.open_edit(longer, start=0) as edit:
        assert edit.num_entries == len(cache.ids)


def test_misuse_is_refused(cache):
    n = cache.size
    edit = cache.manager.open_edit(cache.ids, start=2 * n)
    with pytest.raises(ValueError, match=f"the edit spans \\[{2 * n}, {6 * n}\\), got entries from 0"):
        edit.own(np.array([0]))
    with pytest.raises(ValueError, match="the edit spans"):
        edit.hide(0, n)
    with pytest.raises(ValueError, match="have slots already"):
        edit.allocate(np.array([3 * n]))
    with pytest.raises(ValueError, match="keeps its length"):
        edit.commit(cache.ids[:-1])
    with pytest.raises(ValueError, match="must stay as they are"):
        edit.commit(cache.key(0, 1))
    edit.hide(3 * n, 4 * n)
    with pytest.raises(ValueError, match="hidden entries have no slots"):
        edit.own(np.array([3 * n]))
    with pytest.raises(ValueError, match="another key"):
        edit.commit(cache.ids)
    edit.abort()
    with pytest.raises(ValueError, match="closed"):
        edit.hide(3 * n, 4 * n)
    with pytest.raises(ValueError, match="closed"):
        edit.commit(cache.key(3 * n, 4 * n))
    assert cache.values(cache.ids) == list(range(1, 6 * n + 1))


def test_committing_the_same_key_without_changes_is_no_edit(cache):
    with cache.manager.open_edit(cache.ids, start=0) as edit:
        assert edit.commit(cache.ids) == 0
    assert cache.manager.match(cache.ids) == len(cache.ids)
