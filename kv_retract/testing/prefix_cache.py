"""Conformance suite of prefix indexes: integers only, compared with the oracle `NaiveCache`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pytest

from ..cache.base import NO_SLOT, IntArray, PrefixCache
from ..cache.naive import NaiveCache
from ..errors import CacheIntegrityError
from .prefix_cache_walk import RandomWalk, rows


class Pages(Protocol):
    """`pages(7, 8)`: the entries of two pages, as ids or as slots; no two names share an entry."""

    def __call__(self, *names: int) -> IntArray:
        """Return `page_size` integers for each name."""


def matched(index: PrefixCache, ids: IntArray, **where: str) -> list[int]:
    """Return the slots of the longest indexed prefix."""
    slots: list[int] = index.match_prefix(ids, **where).slots.tolist()
    return slots


class PrefixCacheConformance:
    """Subclass it and provide the fixture `make_index`: a function from a page size to an empty index.

    Override the fixture `page_size` where an index knows other page sizes than 1, 4 and 16. Paths are written in
    whole pages, so every test runs at every page size. The order of eviction is the index's own affair.
    """

    @pytest.fixture
    def make_index(self) -> Callable[[int], PrefixCache]:
        """Return what makes an empty index of a page size."""
        raise NotImplementedError("give the suite a fixture `make_index`")

    @pytest.fixture(params=[1, 4, 16])
    def page_size(self, request: pytest.FixtureRequest) -> int:
        """Return a page size."""
        return int(request.param)

    @pytest.fixture
    def index(self, make_index: Callable[[int], PrefixCache], page_size: int) -> Iterator[PrefixCache]:
        """Return an empty index; its integrity is checked after the test."""
        index = make_index(page_size)
        assert index.page_size == page_size
        yield index
        index.check_integrity()

    @pytest.fixture
    def pages(self, page_size: int) -> Pages:
        """Return the writer of paths."""

        def pages(*names: int) -> IntArray:
            entries: IntArray = np.array(names, dtype=np.int64)[:, None] * page_size + np.arange(page_size)
            return entries.reshape(-1)

        return pages

    # -- match and insert -------------------------------------------------------------------------------------------

    def test_match_is_the_longest_page_aligned_prefix(self, index: PrefixCache, pages: Pages) -> None:
        """One differing or missing entry costs its page."""
        assert index.insert(pages(0, 1, 2), pages(10, 11, 12)) == 0
        assert matched(index, pages(0, 1, 2, 3)) == pages(10, 11, 12).tolist()
        other = pages(0, 1, 2)
        other[-1] = -7
        assert matched(index, other) == pages(10, 11).tolist()
        assert matched(index, pages(0, 1, 2)[:-1]) == pages(10, 11).tolist()
        assert matched(index, pages(5)) == matched(index, pages()) == []

    def test_a_tail_shorter_than_a_page_is_not_indexed(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Neither matched nor counted."""
        ids = pages(0, 1)[: 2 * page_size - 1]
        assert index.insert(ids, ids) == 0
        assert len(matched(index, ids)) == index.evictable_size == len(ids) // page_size * page_size

    def test_what_was_indexed_keeps_its_slots(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Insert returns how much that is; its own slots for that part are not taken."""
        index.insert(pages(0, 1), pages(10, 11))
        assert index.insert(pages(0, 1, 2), pages(20, 21, 22)) == 2 * page_size
        assert index.insert(pages(0), pages(30)) == page_size
        assert matched(index, pages(0, 1, 2)) == pages(10, 11, 22).tolist()

    def test_results_are_copies(self, index: PrefixCache, pages: Pages) -> None:
        """Neither what was handed in nor what was handed out is the index's own."""
        ids, slots = pages(0, 1), pages(10, 11)
        index.insert(ids, slots)
        ids[:], slots[:] = 99, 99
        index.match_prefix(pages(0, 1)).slots[:] = 99
        assert matched(index, pages(0, 1)) == pages(10, 11).tolist()

    def test_namespaces_never_match(self, index: PrefixCache, pages: Pages) -> None:
        """Nor are they removed together."""
        index.insert(pages(0, 1), pages(10, 11), extra_key="a")
        index.insert(pages(0, 1), pages(20, 21), extra_key="b")
        assert matched(index, pages(0, 1)) == []
        assert index.exclusive_from(pages(0, 1), extra_key="b") == 0
        assert index.remove_tail(pages(0, 1), 0, extra_key="a").tolist() == pages(10, 11).tolist()
        assert matched(index, pages(0, 1), extra_key="b") == pages(20, 21).tolist()

    def test_ids_and_slots_must_pair_up(self, index: PrefixCache, pages: Pages) -> None:
        """ValueError, and nothing is indexed."""
        with pytest.raises(ValueError):
            index.insert(pages(0, 1), pages(0))
        assert matched(index, pages(0, 1)) == []

    # -- hidden entries and sizes -----------------------------------------------------------------------------------

    def test_hidden_tombstones_cost_nothing_and_do_not_stall_eviction(
        self, index: PrefixCache, pages: Pages, page_size: int
    ) -> None:
        """An entry without a slot is matched, not counted, and eviction goes on past it."""
        hidden = np.full(page_size, NO_SLOT, dtype=np.int64)
        slots = np.concatenate([pages(7, 8), hidden, hidden])
        index.insert(pages(0, 1, 2, 3), slots)
        assert index.evictable_size == 2 * page_size
        assert matched(index, pages(0, 1, 2, 3)) == slots.tolist()
        index.match_prefix(pages(0, 1))  # a tree splits here: the leaf below has no slot at all
        given = index.evict(1)
        assert np.count_nonzero(given != NO_SLOT) >= 1
        assert rows(given, page_size) <= rows(slots, page_size)
        assert index.evictable_size == 2 * page_size - np.count_nonzero(given != NO_SLOT)

    def test_partly_hidden_pages_stay_whole(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """What is given up keeps the form in which it was indexed, so that each row is one page."""
        slots = pages(4, 5, 6)
        slots[1::2] = NO_SLOT
        index.insert(pages(0, 1, 2), slots)
        assert index.evictable_size == np.count_nonzero(slots != NO_SLOT)
        assert rows(index.held_slots(), page_size) == rows(slots, page_size)
        assert index.remove_tail(pages(0, 1, 2), page_size).tolist() == slots[page_size:].tolist()
        assert index.evict(100 * page_size).tolist() == slots[:page_size].tolist()

    def test_a_page_on_two_paths_is_held_twice(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """One row for each reference: an edited path shares the pages behind its tombstones."""
        hidden = np.full(page_size, NO_SLOT, dtype=np.int64)
        index.insert(pages(0, 1, 2), pages(10, 11, 12))
        index.insert(pages(0, -5, 2), np.concatenate([pages(10), hidden, pages(12)]))
        want = [pages(10), pages(11), pages(12), hidden, pages(12)]
        assert sorted(index.held_slots().reshape(-1, page_size).tolist()) == sorted(row.tolist() for row in want)

    def test_paths_make_the_same_index_again(
        self, make_index: Callable[[int], PrefixCache], index: PrefixCache, pages: Pages, page_size: int
    ) -> None:
        """Whole paths with their namespaces, tombstones and shared pages; no path that another one continues."""
        hidden = np.full(page_size, NO_SLOT, dtype=np.int64)
        ends = [
            ("", pages(0, 1, 2, 3), pages(10, 11, 12, 13)),
            ("", pages(0, 1, 7), pages(10, 11, 17)),
            ("", pages(0, -5, 2), np.concatenate([pages(10), hidden, pages(12)])),
            ("b\0", pages(0, 1), pages(20, 21)),
        ]
        for extra_key, ids, slots in [("", pages(0, 1), pages(10, 11)), *ends]:
            index.insert(ids, slots, extra_key=extra_key)
        paths = list(index.paths())
        twin = make_index(page_size)
        for extra_key, ids, slots in paths:
            twin.insert(ids, slots, extra_key=extra_key)
        found = [(extra_key, ids.tolist(), slots.tolist()) for extra_key, ids, slots in paths]
        assert sorted(found) == sorted((extra_key, ids.tolist(), slots.tolist()) for extra_key, ids, slots in ends)
        held = [np.sort(one.held_slots().reshape(-1, page_size), axis=0).tolist() for one in (index, twin)]
        assert held[0] == held[1] and twin.evictable_size == index.evictable_size
        for _, ids, slots in paths:
            ids[:], slots[:] = 99, 99
        for extra_key, ids, slots in ends:
            assert matched(index, ids, extra_key=extra_key) == slots.tolist(), "what is listed is a copy"
        assert not list(make_index(page_size).paths())

    # -- locks and eviction -----------------------------------------------------------------------------------------

    def test_sizes_follow_locks(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Each lock needs its unlock; one too many is an error."""
        index.insert(pages(*range(6)), pages(*range(6)))
        node = index.match_prefix(pages(*range(4))).node
        sizes = []
        for change in (index.inc_lock_ref, index.inc_lock_ref, index.dec_lock_ref, index.dec_lock_ref):
            change(node)
            index.check_integrity()
            sizes.append((index.protected_size // page_size, index.evictable_size // page_size))
        assert sizes == [(4, 2), (4, 2), (4, 2), (0, 6)]
        with pytest.raises(CacheIntegrityError):
            index.dec_lock_ref(node)

    def test_a_miss_can_be_locked(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Its node protects nothing, also once something is indexed."""
        node = index.match_prefix(pages(0)).node
        index.inc_lock_ref(node)
        index.insert(pages(0), pages(0))
        assert (index.protected_size, index.evictable_size) == (0, page_size)
        index.dec_lock_ref(node)

    def test_locked_paths_are_neither_evicted_nor_removed(
        self, index: PrefixCache, pages: Pages, page_size: int
    ) -> None:
        """Only what lies behind the lock goes."""
        index.insert(pages(*range(6)), pages(*range(6)))
        index.inc_lock_ref(index.match_prefix(pages(*range(4))).node)
        assert rows(index.evict(100 * page_size), page_size) == rows(pages(4, 5), page_size)
        assert index.remove_tail(pages(*range(6)), 0).tolist() == []
        assert matched(index, pages(*range(6))) == pages(*range(4)).tolist()

    def test_a_lock_survives_forks_of_its_path(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Later paths may branch off anywhere; the handle stays valid."""
        index.insert(pages(*range(6)), pages(*range(6)))
        node = index.match_prefix(pages(*range(6))).node
        index.inc_lock_ref(node)
        index.insert(pages(0, 1, 2, 9), pages(0, 1, 2, 19))
        index.insert(pages(0, 8), pages(0, 18))
        assert index.protected_size == 6 * page_size
        assert rows(index.evict(100 * page_size), page_size) == rows(pages(18, 19), page_size)
        index.dec_lock_ref(node)
        assert (index.protected_size, index.evictable_size) == (0, 6 * page_size)

    def test_evicting_a_branch_lets_the_trunk_go_next(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """In the end nothing is left, and nothing more is given."""
        index.insert(pages(0, 1), pages(0, 1))
        index.insert(pages(0, 1, 2, 3), pages(0, 1, 2, 3))
        assert rows(index.evict(100 * page_size), page_size) == rows(pages(0, 1, 2, 3), page_size)
        assert index.evictable_size == 0 and index.held_slots().tolist() == []
        assert index.evict(1).tolist() == []

    def test_eviction_stops_when_enough_is_given_up(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Enough, and no more than the leaf that made it enough."""
        for first in (0, 50):
            path = pages(*range(first, first + 4))
            index.insert(path, path)
        given = index.evict(3 * page_size)
        assert 3 * page_size <= len(given) <= 4 * page_size
        assert index.evictable_size == 8 * page_size - len(given)

    # -- what only one path uses ------------------------------------------------------------------------------------

    def test_exclusive_from_finds_the_last_branch(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """Branches and foreign locks count, the caller's own locks do not."""
        path = pages(*range(6))
        assert index.exclusive_from(path) == 0, "nothing matches"
        index.insert(path, path)
        assert index.exclusive_from(path) == 0
        index.insert(pages(0, 1, 8, 9), pages(0, 1, 8, 9))
        assert index.exclusive_from(path) == 2 * page_size
        assert index.exclusive_from(path[: 3 * page_size]) == 3 * page_size, "its own continuation is another branch"
        index.inc_lock_ref(index.match_prefix(path[: 4 * page_size]).node)
        assert index.exclusive_from(path) == 4 * page_size
        assert index.exclusive_from(path, locks=1) == 2 * page_size

    def test_remove_tail_stops_at_a_branch(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """The other path stays whole; removing again gives nothing."""
        index.insert(pages(*range(6)), pages(*range(6)))
        index.insert(pages(0, 1, 2, 9), pages(0, 1, 2, 19))
        given = index.remove_tail(pages(*range(6)), page_size)
        assert rows(given, page_size) == rows(pages(3, 4, 5), page_size)
        assert matched(index, pages(*range(6))) == pages(0, 1, 2).tolist()
        assert matched(index, pages(0, 1, 2, 9)) == pages(0, 1, 2, 19).tolist()
        assert index.remove_tail(pages(*range(6)), page_size).tolist() == []

    def test_remove_branches_takes_every_path_through_an_entry(
        self, index: PrefixCache, pages: Pages, page_size: int
    ) -> None:
        """The path's own tail, its continuations and its forks go; what lies before, beside or under a lock stays."""
        for path in (pages(0, 1, 2, 3), pages(0, 1, 2, 7), pages(0, 1, 8), pages(0, 9)):
            index.insert(path, path)
        given = index.remove_branches(pages(0, 1, 2), page_size)
        assert np.sort(given).tolist() == np.sort(pages(1, 2, 3, 7, 8)).tolist()
        assert len(index.match_prefix(pages(0, 1, 8)).slots) == page_size
        assert len(index.match_prefix(pages(0, 9)).slots) == 2 * page_size
        assert index.remove_branches(pages(0, 1, 2), page_size).tolist() == []
        assert index.remove_branches(pages(0), page_size).tolist() == []
        index.check_integrity()

    def test_remove_branches_leaves_what_is_locked(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """A running sequence keeps its path; the others go."""
        for path in (pages(0, 1, 2), pages(0, 1, 7)):
            index.insert(path, path)
        node = index.match_prefix(pages(0, 1, 7)).node
        index.inc_lock_ref(node)
        assert index.remove_branches(pages(0, 1, 2), 0).tolist() == pages(2).tolist()
        assert index.match_prefix(pages(0, 1, 7)).slots.tolist() == pages(0, 1, 7).tolist()
        index.dec_lock_ref(node)
        index.check_integrity()

    def test_remove_tail_inside_a_page_takes_the_page(self, index: PrefixCache, pages: Pages, page_size: int) -> None:
        """And leaves the pages before it."""
        index.insert(pages(0, 1, 2), pages(0, 1, 2))
        given = index.remove_tail(pages(0, 1, 2), 2 * page_size - 1)
        assert rows(given, page_size) == rows(pages(1, 2), page_size)
        assert matched(index, pages(0, 1, 2)) == pages(0).tolist()

    def test_remove_tail_keeps_what_continues_past_the_path(self, index: PrefixCache, pages: Pages) -> None:
        """A longer path is somebody else's."""
        index.insert(pages(*range(6)), pages(*range(6)))
        assert index.remove_tail(pages(*range(4)), 1).tolist() == []
        assert matched(index, pages(*range(6))) == pages(*range(6)).tolist()

    # -- all of it together -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(4))
    def test_random_operations_agree_with_the_oracle(self, index: PrefixCache, page_size: int, seed: int) -> None:
        """After every operation: same matches, sizes and slots as `NaiveCache`, evictions fair, integrity whole."""
        walk = RandomWalk(index, NaiveCache(page_size), seed)
        for _ in range(150):
            walk.step()
        assert min(walk.done[name] for name in walk.OPERATIONS) > 5, f"too little happened: {walk.done}"
