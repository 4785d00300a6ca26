"""The contract of `PrefixCache`, for the radix tree and for the oracle alike."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kv_retract.cache.base import NO_SLOT
from kv_retract.cache.naive import NaiveCache
from kv_retract.cache.radix import RadixCache
from kv_retract.errors import CacheIntegrityError, UnknownNameError

PAGE_SIZES = [1, 4, 16]


@pytest.fixture(params=[RadixCache, NaiveCache])
def index_type(request):
    return request.param


def ids_of(length: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + length, dtype=np.int64)


def matched(index, ids, **where) -> list[int]:
    return index.match_prefix(np.asarray(ids, dtype=np.int64), **where).slots.tolist()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_match_is_the_longest_page_aligned_prefix(index_type, page_size):
    index, ids = index_type(page_size=page_size), ids_of(3 * page_size)
    assert index.insert(ids, ids + 100) == 0
    assert matched(index, ids) == (ids + 100).tolist()
    other = ids.copy()
    other[-1] = -7
    assert matched(index, other) == (ids[: 2 * page_size] + 100).tolist()
    assert (
        matched(index, ids[: 2 * page_size + page_size - 1])
        == (ids + 100)[: (3 * page_size - 1) // page_size * page_size].tolist()
    )
    index.check_integrity()


@pytest.mark.parametrize("page_size", [4, 16])
def test_a_tail_shorter_than_a_page_is_not_indexed(index_type, page_size):
    index, ids = index_type(page_size=page_size), ids_of(page_size + 3)
    assert index.insert(ids, ids) == 0
    assert len(matched(index, ids)) == page_size
    assert index.evictable_size == page_size


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_what_was_indexed_keeps_its_slots(index_type, page_size):
    index, ids = index_type(page_size=page_size), ids_of(3 * page_size)
    index.insert(ids[: 2 * page_size], ids[: 2 * page_size])
    assert index.insert(ids, ids + 1000) == 2 * page_size
    assert matched(index, ids) == [*range(2 * page_size), *range(1000 + 2 * page_size, 1000 + 3 * page_size)]


def test_results_are_copies(index_type):
    index, ids, slots = index_type(), ids_of(4), ids_of(4, 10)
    index.insert(ids, slots)
    ids_used = ids.copy()
    ids[:], slots[:] = 99, 99
    index.match_prefix(ids_used).slots[:] = 99
    assert matched(index, ids_used) == [10, 11, 12, 13]


def test_namespaces_never_match(index_type):
    index, ids = index_type(), ids_of(4)
    index.insert(ids, ids, extra_key="a")
    index.insert(ids, ids + 10, extra_key="b")
    assert matched(index, ids) == []
    assert matched(index, ids, extra_key="b") == [10, 11, 12, 13]


def test_ids_and_slots_must_pair_up(index_type):
    with pytest.raises(ValueError, match="4 ids and 3 slots"):
        index_type().insert(ids_of(4), ids_of(3))


def test_page_size_must_be_positive(index_type):
    with pytest.raises(ValueError, match="page_size"):
        index_type(page_size=0)


def test_hidden_tombstones_cost_nothing_and_do_not_stall_eviction(index_type):
    index = index_type()
    index.insert(ids_of(4), np.array([7, 8, NO_SLOT, NO_SLOT]))
    assert index.evictable_size == 2
    assert matched(index, ids_of(4)) == [7, 8, NO_SLOT, NO_SLOT]
    index.match_prefix(ids_of(2))  # splits: the leaf below has no slot at all
    assert sorted(index.evict(1)) in ([-1, -1, 7, 8], [-1, -1, 8])
    index.check_integrity()


def test_sizes_follow_locks(index_type):
    index = index_type()
    index.insert(ids_of(6), ids_of(6))
    node = index.match_prefix(ids_of(4)).node
    index.inc_lock_ref(node)
    index.inc_lock_ref(node)
    assert (index.protected_size, index.evictable_size) == (4, 2)
    index.dec_lock_ref(node)
    assert (index.protected_size, index.evictable_size) == (4, 2)
    index.dec_lock_ref(node)
    assert (index.protected_size, index.evictable_size) == (0, 6)
    with pytest.raises(CacheIntegrityError, match="not locked"):
        index.dec_lock_ref(node)


def test_locked_paths_are_neither_evicted_nor_removed(index_type):
    index = index_type()
    index.insert(ids_of(6), ids_of(6))
    index.inc_lock_ref(index.match_prefix(ids_of(4)).node)
    assert sorted(index.evict(100)) == [4, 5]
    assert index.remove_tail(ids_of(6), 0).tolist() == []
    assert matched(index, ids_of(6)) == [0, 1, 2, 3]


def test_a_lock_survives_a_split_below_and_above(index_type):
    index = index_type()
    index.insert(ids_of(6), ids_of(6))
    node = index.match_prefix(ids_of(6)).node
    index.inc_lock_ref(node)
    index.insert(np.array([0, 1, 2, 9]), np.array([0, 1, 2, 19]))
    index.insert(np.array([0, 8]), np.array([0, 18]))
    assert index.protected_size == 6
    assert sorted(index.evict(100)) == [18, 19]
    index.dec_lock_ref(node)
    assert (index.protected_size, index.evictable_size) == (0, 6)
    index.check_integrity()


def test_evicting_a_branch_lets_the_trunk_go_next(index_type):
    index = index_type()
    index.insert(ids_of(2), ids_of(2))
    index.insert(ids_of(4), ids_of(4))
    assert sorted(index.evict(100)) == [0, 1, 2, 3]
    assert index.evictable_size == 0
    assert index.evict(1).tolist() == []


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_exclusive_from_finds_the_last_branch(index_type, page_size):
    index, ids = index_type(page_size=page_size), ids_of(6 * page_size)
    index.insert(ids, ids)
    assert index.exclusive_from(ids) == 0
    fork = ids[: 4 * page_size].copy()
    fork[2 * page_size :] += 500
    index.insert(fork, fork)
    assert index.exclusive_from(ids) == 2 * page_size
    assert index.exclusive_from(ids[: 3 * page_size]) == 3 * page_size, "its own continuation is another branch"
    node = index.match_prefix(ids[: 4 * page_size]).node
    index.inc_lock_ref(node)
    assert index.exclusive_from(ids) == 4 * page_size
    assert index.exclusive_from(ids, locks=1) == 2 * page_size


def test_nothing_is_exclusive_where_nothing_matches(index_type):
    assert index_type().exclusive_from(ids_of(3)) == 0


def test_remove_tail_stops_at_a_branch(index_type):
    index = index_type()
    index.insert(ids_of(6), ids_of(6))
    index.insert(np.array([0, 1, 2, 9]), np.array([0, 1, 2, 19]))
    assert index.remove_tail(ids_of(6), 1).tolist() == [3, 4, 5]
    assert matched(index, ids_of(6)) == [0, 1, 2]
    assert matched(index, [0, 1, 2, 9]) == [0, 1, 2, 19]


def test_remove_tail_inside_a_page_takes_the_page(index_type):
    index = index_type(page_size=4)
    index.insert(ids_of(12), ids_of(12))
    assert index.remove_tail(ids_of(12), 6).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    index.check_integrity()


def test_remove_tail_keeps_what_continues_past_the_path(index_type):
    index = index_type()
    index.insert(ids_of(6), ids_of(6))
    assert index.remove_tail(ids_of(4), 2).tolist() == []
    assert len(matched(index, ids_of(6))) == 6


def test_a_page_on_two_paths_is_held_twice(index_type):
    index = index_type(page_size=2)
    index.insert(np.array([1, 2, 3, 4]), np.array([0, 1, 2, 3]))
    index.insert(np.array([1, -5, 3, 4]), np.array([0, NO_SLOT, 2, 3]))
    rows = sorted(map(tuple, index.held_slots().reshape(-1, 2).tolist()))
    assert rows == [(0, -1), (0, 1), (2, 3), (2, 3)]


def fill(index: RadixCache) -> None:
    for name in (1, 2, 3):
        index.insert(np.array([name]), np.array([name]))


def test_lru_evicts_what_was_used_longest_ago():
    index = RadixCache(eviction="lru")
    fill(index)
    index.match_prefix(np.array([1]))
    assert [int(index.evict(1)[0]) for _ in range(3)] == [2, 3, 1]


def test_lfu_evicts_what_was_used_least():
    index = RadixCache(eviction="lfu")
    fill(index)
    for name in (3, 1, 1, 2):
        index.match_prefix(np.array([name]))
    assert [int(index.evict(1)[0]) for _ in range(3)] == [3, 2, 1]


def test_eviction_stops_when_enough_is_given_up():
    index = RadixCache()
    index.insert(ids_of(4), ids_of(4))
    index.insert(ids_of(4, 50), ids_of(4, 50))
    assert index.evict(3).tolist() == [0, 1, 2, 3]
    assert index.evictable_size == 4


def test_looking_at_exclusiveness_is_no_use():
    index = RadixCache()
    fill(index)
    index.exclusive_from(np.array([1]))
    assert index.evict(1).tolist() == [1]


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown eviction policy 'fifo'; known: lfu, lru"):
        RadixCache(eviction="fifo")


def test_namespaces_are_forgotten_with_their_last_entry():
    index = RadixCache()
    for number in range(50):
        index.match_prefix(ids_of(2), extra_key=f"never stored {number}")
        index.insert(ids_of(2), ids_of(2), extra_key=f"thread {number}")
    index.evict(1000)
    assert index._roots == {}


@pytest.mark.parametrize("num_nodes", [1, 400])
@pytest.mark.parametrize("page_size", [1, 16])
def test_matching_32k_tokens_takes_milliseconds(page_size, num_nodes):
    length = 32_768
    index, ids = RadixCache(page_size=page_size), ids_of(length)
    for end in np.linspace(length / num_nodes, length, num_nodes).astype(int):
        index.insert(ids[:end], ids[:end])
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        slots = index.match_prefix(ids).slots
        seconds.append(time.perf_counter() - started)
    assert len(slots) == length
    assert min(seconds) < 0.005


@pytest.mark.parametrize(
    "break_it",
    [
        lambda index, node: setattr(node, "lock_ref", 1),
        lambda index, node: setattr(node, "num_slots", 1),
        lambda index, node: setattr(node, "slots", np.array([3, 3])),
        lambda index, node: setattr(node, "ids", node.ids[:1]),
        lambda index, node: setattr(node, "ids", node.ids + 1),
    ],
)
def test_integrity_finds_damage(break_it):
    index = RadixCache()
    index.insert(ids_of(2), ids_of(2))
    node = index.match_prefix(ids_of(2)).node
    index.check_integrity()
    break_it(index, node)
    with pytest.raises(CacheIntegrityError):
        index.check_integrity()
