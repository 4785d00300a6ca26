from __future__ import annotations

import numpy as np
import pytest
import torch

from kv_retract.cache.pool import PagedKVPool
from kv_retract.errors import CacheIntegrityError, PoolExhaustedError


def make_pool(num_pages: int = 4, page_size: int = 2, **changes) -> PagedKVPool:
    sizes = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 5, "num_pages": num_pages, "page_size": page_size}
    return PagedKVPool(**{**sizes, **changes})


def test_shapes_and_dtype():
    pool = make_pool(dtype=torch.bfloat16)
    assert pool.k.shape == pool.v.shape == (2, 8, 3, 5)
    assert pool.k.dtype == pool.v.dtype == torch.bfloat16


def test_alloc_hands_out_every_page_once():
    pool = make_pool()
    pages = np.concatenate([pool.alloc(3), pool.alloc(1)])
    assert sorted(pages) == [0, 1, 2, 3]
    assert pool.refcounts.tolist() == [1, 1, 1, 1]
    assert pool.num_free == 0


def test_an_exhausted_pool_says_what_is_missing_and_takes_nothing():
    pool = make_pool()
    pool.alloc(3)
    with pytest.raises(PoolExhaustedError, match="needs 2 pages of 2 tokens but 1 of 4 are free; give the engine"):
        pool.alloc(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_a_page_is_free_when_its_last_holder_is_gone():
    pool = make_pool()
    pages = pool.alloc(2)
    pool.retain(pages[:1])
    assert pool.release(pages).tolist() == pages[1:].tolist()
    assert pool.num_free == 3
    assert pool.release(pages[:1]).tolist() == pages[:1].tolist()
    assert pool.num_free == 4


def test_one_call_may_name_a_page_twice():
    pool = make_pool()
    page = pool.alloc(1)
    pool.retain(np.repeat(page, 2))
    assert pool.refcounts[page[0]] == 3
    assert pool.release(np.repeat(page, 3)).tolist() == page.tolist()
    assert pool.num_free == 4


@pytest.mark.parametrize("operation", ["retain", "release"])
@pytest.mark.parametrize("page", [0, -1, 4])
def test_free_and_unknown_pages_are_refused(operation, page):
    pool = make_pool()
    with pytest.raises(CacheIntegrityError):
        getattr(pool, operation)(np.array([page]))
    assert pool.refcounts.tolist() == [0, 0, 0, 0]


def test_releasing_too_often_changes_nothing():
    pool = make_pool()
    pages = pool.alloc(2)
    with pytest.raises(CacheIntegrityError, match="freed twice"):
        pool.release(np.concatenate([pages, pages[:1]]))
    assert pool.refcounts[pages].tolist() == [1, 1]


def test_read_returns_copies_of_what_was_written():
    pool = make_pool()
    slots = np.array([5, 0])
    k, v = torch.randn(2, 2, 3, 5), torch.randn(2, 2, 3, 5)
    pool.write(slots, k, v)
    got_k, got_v = pool.read(slots)
    assert torch.equal(got_k, k) and torch.equal(got_v, v)
    got_k.zero_()
    assert torch.equal(pool.read(slots)[0], k), "a reader must not be able to change the cache"
    assert not pool.k[:, [1, 2, 3, 4, 6, 7]].any(), "a write must not touch other slots"


def test_copy_and_wipe():
    pool = make_pool()
    k = torch.randn(2, 2, 3, 5)
    pool.write(np.array([2, 3]), k, -k)
    pool.copy_pages(np.array([1]), np.array([3]))
    assert torch.equal(pool.k[:, 6:8], k) and torch.equal(pool.v[:, 6:8], -k)
    pool.wipe(np.array([2]))
    assert not pool.k[:, 2].any() and not pool.v[:, 2].any()
    assert torch.equal(pool.k[:, 3], k[:, 1])


def test_a_pool_without_room_for_anything_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make_pool(num_pages=0)


def test_integrity_finds_a_leaked_page():
    pool = make_pool()
    pool.refcounts[pool.alloc(1)] = 0
    with pytest.raises(CacheIntegrityError, match="free list"):
        pool.check_integrity()
