"""Running sequences: sharing, forks, copy on write, eviction under them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kv_retract.cache.manager import CacheManager
from kv_retract.cache.pool import PagedKVPool
from kv_retract.cache.radix import RadixCache
from kv_retract.errors import CacheIntegrityError, PoolExhaustedError

PAGE_SIZES = [1, 4, 16]


def make_manager(num_pages: int = 64, page_size: int = 1) -> CacheManager:
    pool = PagedKVPool(num_layers=2, num_kv_heads=1, head_dim=2, num_pages=num_pages, page_size=page_size)
    return CacheManager(pool, RadixCache(page_size=page_size))


def ids_of(length: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + length, dtype=np.int64)


def write(manager: CacheManager, slots: np.ndarray, value: float) -> None:
    k = torch.full((2, len(slots), 1, 2), value)
    manager.pool.write(slots, k, -k)


def values(manager: CacheManager, slots: np.ndarray) -> list[float]:
    k, v = manager.pool.read(slots)
    assert torch.equal(k, -v)
    return k[0, :, 0, 0].tolist()


def store(manager: CacheManager, ids: np.ndarray, value: float = 1.0, **where) -> None:
    lease = manager.lease(ids, **where)
    write(manager, manager.append(lease, ids[lease.num_cached :]), value)
    manager.release(lease)


def test_pool_and_index_must_agree():
    pool = PagedKVPool(num_layers=1, num_kv_heads=1, head_dim=1, num_pages=2, page_size=2)
    with pytest.raises(ValueError, match="agree on the page size, got 2 and 4"):
        CacheManager(pool, RadixCache(page_size=4))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_released_sequence_is_found_again(page_size):
    manager, ids = make_manager(page_size=page_size), ids_of(3 * page_size + 1)
    store(manager, ids, 5.0)
    aligned = len(ids) // page_size * page_size
    assert manager.match(ids) == aligned
    lease = manager.lease(ids)
    assert lease.num_cached == aligned and values(manager, lease.slots) == [5.0] * aligned
    assert manager.tokens_in_use() == aligned, "a tail shorter than a page goes back"
    manager.release(lease)
    manager.check_integrity()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_release_keeps_as_much_as_asked(page_size):
    manager, ids = make_manager(page_size=page_size), ids_of(4 * page_size)
    lease = manager.lease(ids)
    manager.append(lease, ids)
    manager.release(lease, keep=2 * page_size + page_size - 1)
    assert manager.match(ids) == (3 * page_size - 1) // page_size * page_size
    manager.check_integrity()


def test_release_with_nothing_new_leaves_no_trace():
    manager = make_manager()
    lease = manager.lease(ids_of(8))
    manager.append(lease, ids_of(8))
    manager.release(lease, keep=lease.num_cached)
    manager.release(lease)
    assert manager.match(ids_of(8)) == 0 and manager.tokens_in_use() == 0


@pytest.mark.parametrize("use", ["append", "publish", "fork"])
def test_a_released_lease_is_unusable(use):
    manager = make_manager()
    lease = manager.lease(ids_of(2))
    manager.release(lease)
    with pytest.raises(ValueError, match="released"):
        getattr(manager, use)(*([lease, ids_of(1)] if use == "append" else [lease]))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_publish_shares_at_once_and_goes_on(page_size):
    manager, ids = make_manager(page_size=page_size), ids_of(2 * page_size)
    lease = manager.lease(ids)
    write(manager, manager.append(lease, ids), 3.0)
    manager.publish(lease)
    assert manager.match(ids) == len(ids)
    assert manager.index.protected_size == len(ids), "the running sequence locks what it published"
    manager.append(lease, ids_of(page_size, 100))
    manager.release(lease)
    assert manager.match(np.concatenate([ids, ids_of(page_size, 100)])) == 3 * page_size
    assert manager.index.protected_size == 0
    manager.check_integrity()


def test_publishing_again_and_again_leaves_no_lock():
    manager = make_manager()
    lease = manager.lease(ids_of(0))
    for start in (0, 3, 6):
        manager.append(lease, ids_of(3, start))
        manager.publish(lease)
    manager.release(lease)
    assert (manager.index.protected_size, manager.index.evictable_size) == (0, 9)


def test_a_fork_keeps_its_own_lock():
    manager, ids = make_manager(), ids_of(4)
    store(manager, ids)
    lease = manager.lease(ids)
    twin = manager.fork(lease)
    manager.release(lease)
    assert manager.index.protected_size == 4
    manager.release(twin)
    assert manager.index.protected_size == 0


def test_equal_sequences_are_stored_once():
    manager, ids = make_manager(), ids_of(8)
    first, second = manager.lease(ids), manager.lease(ids)
    write(manager, manager.append(first, ids), 1.0)
    write(manager, manager.append(second, ids), 1.0)
    assert manager.tokens_in_use() == 16
    manager.publish(first)
    manager.publish(second)
    assert manager.tokens_in_use() == 8
    assert first.slots.tolist() == second.slots.tolist()
    manager.release(first)
    manager.release(second)
    manager.check_integrity()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_fork_of_8k_tokens_costs_next_to_nothing(page_size):
    length = 8192 + page_size // 2  # the fork shares a partly filled page, where there are pages
    manager, ids = make_manager(num_pages=10_000 // page_size, page_size=page_size), ids_of(length)
    lease = manager.lease(ids)
    write(manager, manager.append(lease, ids), 1.0)
    before = manager.pages_in_use()
    twin = manager.fork(lease)
    assert manager.pages_in_use() == before
    manager.append(twin, ids_of(1, 9_000_000))
    assert manager.pages_in_use() - before == 1 < 0.01 * before
    manager.release(lease)
    manager.release(twin)
    manager.check_integrity()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_generation_on_one_fork_never_changes_the_other(page_size):
    """A stored cache that generation mutates in place would answer the next question from the wrong history."""
    manager, ids = make_manager(page_size=page_size), ids_of(page_size + max(1, page_size // 2))
    lease = manager.lease(ids)
    write(manager, manager.append(lease, ids), 1.0)
    twin = manager.fork(lease)
    shared = lease.slots.copy()
    write(manager, manager.append(twin, ids_of(3, 100)), 2.0)
    write(manager, manager.append(lease, ids_of(3, 200)), 3.0)
    assert values(manager, lease.slots) == [1.0] * len(ids) + [3.0] * 3
    assert values(manager, twin.slots) == [1.0] * len(ids) + [2.0] * 3
    if page_size > 1:
        assert lease.slots[: len(shared)].tolist() == shared.tolist(), "the last holder writes in place"
    manager.release(lease)
    manager.release(twin)
    manager.check_integrity()


@pytest.mark.parametrize("page_size", [1, 4])
def test_forks_keep_what_they_have_in_common_once(page_size):
    manager = make_manager(num_pages=128, page_size=page_size)
    lease = manager.lease(ids_of(0))
    manager.append(lease, ids_of(18))
    twins = [manager.fork(lease) for _ in range(3)]
    assert all(np.shares_memory(twin.slots, lease.slots) for twin in twins)
    before = lease.slots.tolist()
    for number, twin in enumerate(twins):
        manager.append(twin, ids_of(6, first=100 * (number + 1)))
        manager.append(twin, ids_of(1, first=7))
    assert (lease.ids.tolist(), lease.slots.tolist()) == (list(range(18)), before)
    ends = [twin.ids[18:].tolist() for twin in twins]
    assert ends == [[*range(100 * n, 100 * n + 6), 7] for n in (1, 2, 3)]
    again = manager.fork(twins[0])
    manager.append(again, ids_of(1, first=9))
    assert twins[0].ids.tolist() == again.ids[:-1].tolist()
    manager.check_integrity()
    for each in (lease, again, *twins):
        manager.release(each)
    manager.check_integrity()


def test_sequences_on_one_cached_path_keep_it_once():
    manager = make_manager()
    store(manager, ids_of(20))
    one, two = manager.lease(ids_of(20)), manager.lease(ids_of(20))
    assert np.shares_memory(one.slots, two.slots)
    manager.append(one, ids_of(2, first=100))
    manager.release(one)
    manager.append(two, ids_of(2, first=200))
    three = manager.lease(ids_of(20))
    assert three.slots.tolist() == two.slots[:20].tolist() and two.ids[20:].tolist() == [200, 201]
    shorter = manager.lease(ids_of(11))  # splits the node that the others hold
    assert shorter.ids.tolist() == list(range(11)) and three.slots[:11].tolist() == shorter.slots.tolist()
    for lease in (two, three, shorter):
        manager.release(lease)
    manager.check_integrity()


def test_appending_to_a_cached_path_leaves_the_cached_path_alone():
    manager, ids = make_manager(), ids_of(4)
    store(manager, ids, 1.0)
    lease = manager.lease(ids)
    write(manager, manager.append(lease, ids_of(2, 50)), 9.0)
    manager.release(lease)
    again = manager.lease(ids)
    assert values(manager, again.slots) == [1.0] * 4


def test_a_full_pool_evicts_idle_threads_first():
    manager = make_manager(num_pages=8)
    store(manager, ids_of(4))
    running = manager.lease(ids_of(3, 50))
    manager.append(running, ids_of(3, 50))
    manager.append(running, ids_of(4, 60))
    assert manager.match(ids_of(4)) < 4
    assert len(running) == 7
    manager.release(running)
    manager.check_integrity()


def test_a_sequence_that_does_not_fit_is_left_as_it_was():
    manager = make_manager(num_pages=8)
    lease = manager.lease(ids_of(6))
    slots = manager.append(lease, ids_of(6))
    write(manager, slots, 4.0)
    with pytest.raises(PoolExhaustedError, match="needs 3 pages of 1 tokens but 2 of 8 are free"):
        manager.append(lease, ids_of(3, 50))
    assert lease.slots.tolist() == slots.tolist() and values(manager, slots) == [4.0] * 6
    manager.append(lease, ids_of(2, 50))
    manager.release(lease)
    manager.check_integrity()


def test_drop_zeroes_what_it_frees():
    manager, ids = make_manager(), ids_of(6)
    store(manager, ids, 7.0)
    lease = manager.lease(ids)
    slots = lease.slots.copy()
    manager.release(lease)
    assert manager.drop(ids, 2) == 4
    assert values(manager, slots) == [7.0, 7.0, 0.0, 0.0, 0.0, 0.0]
    assert manager.match(ids) == 2


def test_drop_leaves_what_a_running_sequence_uses():
    manager, ids = make_manager(), ids_of(6)
    store(manager, ids)
    lease = manager.lease(ids[:4])
    assert manager.drop(ids, 0) == 2
    assert manager.match(ids) == 4
    manager.release(lease)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_freed_pages_hold_nothing_however_they_were_freed(page_size):
    manager = make_manager(num_pages=6, page_size=page_size)
    store(manager, ids_of(3 * page_size), 1.0)  # evicted below
    lease = manager.lease(ids_of(5 * page_size, 500))
    write(manager, manager.append(lease, ids_of(5 * page_size, 500)), 2.0)
    manager.release(lease, keep=0)
    for page in np.flatnonzero(manager.pool.refcounts == 0):
        assert values(manager, manager.pool.slots_of(np.array([page]))) == [0.0] * page_size


@pytest.mark.parametrize("change", [1, -1])
def test_integrity_finds_a_wrong_count(change):
    manager = make_manager()
    store(manager, ids_of(3))
    manager.pool.refcounts[manager.index.held_slots()[1]] += change
    with pytest.raises(CacheIntegrityError, match="1 pages are miscounted"):
        manager.check_integrity()


def test_integrity_finds_a_leaked_page():
    manager = make_manager()
    manager.alloc(1)
    with pytest.raises(CacheIntegrityError, match="held 0 times, the pool counts 1"):
        manager.check_integrity()
