"""The oracle itself: it must refuse an eviction that breaks the rules."""

from __future__ import annotations

import numpy as np
import pytest

from kv_retract.cache.naive import NaiveCache
from kv_retract.errors import CacheIntegrityError


@pytest.fixture
def oracle() -> NaiveCache:
    """Paths 1-2-3 (older) and 7 (newer)."""
    oracle = NaiveCache()
    oracle.insert(np.array([1, 2, 3]), np.array([0, 1, 2]))
    oracle.insert(np.array([7]), np.array([3]))
    return oracle


@pytest.mark.parametrize("paths", [[(1, 2, 3)], [(1, 2), (1, 2, 3)], [(1,), (1, 2), (1, 2, 3), (7,)], []])
def test_fair_evictions_pass(oracle, paths):
    oracle.check_eviction([("", path) for path in paths])


@pytest.mark.parametrize(
    ("paths", "why"),
    [([(1, 2)], "middle"), ([(7,)], "more recently"), ([(8,)], "not indexed")],
)
def test_unfair_evictions_are_found(oracle, paths, why):
    with pytest.raises(CacheIntegrityError, match=why):
        oracle.check_eviction([("", path) for path in paths])


def test_evicting_a_locked_page_is_found(oracle):
    oracle.inc_lock_ref(oracle.match_prefix(np.array([1, 2, 3])).node)
    with pytest.raises(CacheIntegrityError, match="locked"):
        oracle.check_eviction([("", (1, 2, 3))])


def test_its_own_eviction_goes_page_by_page(oracle):
    assert oracle.evict(1).tolist() == [2]
    assert oracle.evict(2).tolist() == [1, 0]
    assert oracle.evict(9).tolist() == [3]


def test_integrity_finds_an_orphan(oracle):
    oracle.forget([("", (1, 2))])
    with pytest.raises(CacheIntegrityError, match="without the page before"):
        oracle.check_integrity()
