"""Both layers of the cache of long threads: what stands for what, and nothing left where nothing is held."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kv_retract.cache.base import NO_SLOT
from kv_retract.cache.bilayer import BiLayerPool, WindowShape
from kv_retract.cache.keys import tombstone_ids
from kv_retract.cache.manager import CacheManager
from kv_retract.cache.radix import RadixCache

SHAPE = WindowShape(window=6, ratio=2)
LAYERS, HEADS, DIM = 2, 2, 3


def make_pool(num_windows=4, **options):
    return BiLayerPool(
        num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, num_windows=num_windows, shape=SHAPE, **options
    )


def states(values):
    """K and V that hold a number for each token."""
    k = torch.as_tensor(np.asarray(values), dtype=torch.float32)[None, :, None, None].expand(LAYERS, -1, HEADS, DIM)
    return k, -k


def numbers(k, v):
    """The numbers that `states` put there."""
    assert torch.equal(k, -v) and torch.equal(k, k[:1, :, :1, :1].expand_as(k))
    return k[0, :, 0, 0].tolist()


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "ratio"), [(6, 4), (6, 0), (6, 12), (0, 0), (6, -2), (-6, 2)])
def test_a_window_is_a_multiple_of_the_ratio(window, ratio):
    with pytest.raises(ValueError, match=f"got a window of {window} tokens at ratio {ratio}"):
        WindowShape(window=window, ratio=ratio)


def test_a_block_is_there_while_one_of_its_tokens_is_visible():
    assert WindowShape(window=8, ratio=1).num_landmarks == 8 and WindowShape(window=8, ratio=8).num_landmarks == 1
    slots = np.array([12, 13, NO_SLOT, NO_SLOT, 16, NO_SLOT, NO_SLOT, 1, NO_SLOT, 3, NO_SLOT, NO_SLOT])
    assert SHAPE.num_landmarks == 3
    assert SHAPE.blocks(slots).tolist() == [True, False, True, True, True, False]
    assert SHAPE.blocks(slots[:0]).tolist() == []


# -- storage --------------------------------------------------------------------------------------------------------


def test_landmark_rows_leave_hidden_blocks_out():
    slots = np.array([12, 13, NO_SLOT, NO_SLOT, 16, NO_SLOT, NO_SLOT, 1, NO_SLOT, NO_SLOT, 4, 5])
    assert make_pool().landmark_rows(slots).tolist() == [6, 8, 0, 2]
    assert make_pool().landmark_rows(np.full(6, NO_SLOT)).tolist() == []


def test_rows_are_those_of_the_pages():
    pool = make_pool()
    assert pool.landmark_rows(pool.slots_of(np.array([2, 0]))).tolist() == [6, 7, 8, 0, 1, 2]


def test_landmarks_are_read_as_they_were_written():
    pool = make_pool(dtype=torch.bfloat16)
    assert pool.landmark_k.shape == pool.landmark_v.shape == (LAYERS, 12, HEADS, DIM)
    assert pool.k.shape == (LAYERS, 24, HEADS, DIM) and pool.k.dtype == pool.landmark_k.dtype == torch.bfloat16
    pool.write_landmarks(np.array([7, 2]), *states([5, 9]))
    assert numbers(*pool.read_landmarks(np.arange(12))) == [0, 0, 9, 0, 0, 0, 0, 5, 0, 0, 0, 0]
    assert not pool.k.any()
    read = pool.read_landmarks(np.array([2]))[0]
    read += 1
    assert numbers(*pool.read_landmarks(np.array([2]))) == [9], "what is read is a copy"


def test_a_copy_of_a_window_has_both_layers():
    pool = make_pool()
    pool.write(np.arange(24), *states(np.arange(1, 25)))
    pool.write_landmarks(np.arange(12), *states(np.arange(101, 113)))
    pool.copy_pages(np.array([3, 0]), np.array([1, 2]))
    tokens, landmarks = numbers(pool.k, pool.v), numbers(pool.landmark_k, pool.landmark_v)
    assert tokens == [*range(1, 7), *range(19, 25), *range(1, 7), *range(19, 25)]
    assert landmarks == [101, 102, 103, 110, 111, 112, 101, 102, 103, 110, 111, 112]


@given(slots=st.sets(st.integers(0, 23)), order=st.randoms(use_true_random=False))
def test_a_landmark_is_wiped_with_all_of_its_tokens_only(slots, order):
    pool = make_pool()
    pool.write(np.arange(24), *states(np.ones(24)))
    pool.write_landmarks(np.arange(12), *states(np.ones(12)))
    pool.wipe(np.array(order.sample(sorted(slots), len(slots)), dtype=np.int64))
    assert numbers(pool.k, pool.v) == [float(slot not in slots) for slot in range(24)]
    left = [float(not {2 * row, 2 * row + 1} <= slots) for row in range(12)]
    assert numbers(pool.landmark_k, pool.landmark_v) == left


def test_given_storage_is_used_as_it_is():
    given_k, given_v = (torch.zeros(LAYERS, 24, HEADS, DIM) for _ in range(2))
    pool = make_pool(storage=(given_k, given_v))
    assert pool.k is given_k and pool.v is given_v
    pool.write(np.array([3]), *states([8]))
    assert given_k[:, 3].eq(8).all() and given_v[:, 3].eq(-8).all()


# -- with an index --------------------------------------------------------------------------------------------------

NUM_TOKENS = 4 * SHAPE.window
IDS = np.arange(NUM_TOKENS)
FORK = np.concatenate([IDS[: -SHAPE.window], np.arange(50, 50 + SHAPE.window)])


def contents_of(ids):
    """What `Threads` keeps of a thread: a number for each token and for each landmark."""
    return (ids + 1).tolist(), (ids[SHAPE.ratio - 1 :: SHAPE.ratio] + 1001).tolist()


class Threads:
    """Two threads that share three windows and have a fourth of their own; checked after every operation."""

    def __init__(self):
        self.pool = make_pool(num_windows=12)
        self.manager = CacheManager(self.pool, RadixCache(page_size=SHAPE.window))
        lease = self.manager.lease(IDS)
        self.append(lease, IDS[: -SHAPE.window])
        fork = self.manager.fork(lease)
        self.check()
        self.append(lease, IDS[-SHAPE.window :])
        self.append(fork, FORK[-SHAPE.window :])
        for each in (lease, fork):
            self.manager.release(each)
            self.check()

    def append(self, lease, ids):
        """A window at a time, as they are encoded."""
        for window in ids.reshape(-1, SHAPE.window):
            slots = self.manager.append(lease, window)
            tokens, landmarks = contents_of(window)
            self.pool.write(slots, *states(tokens))
            self.pool.write_landmarks(self.pool.landmark_rows(slots), *states(landmarks))
            self.check()

    def drop(self, ids):
        self.manager.drop(ids, 0)
        self.check()

    def contents(self, ids):
        """Numbers in the cached part of a path: of visible tokens, and of the landmarks that are there."""
        lease = self.manager.lease(ids)
        slots = lease.slots.copy()
        self.manager.release(lease)
        tokens = numbers(*self.pool.read(slots[slots != NO_SLOT]))
        return tokens, numbers(*self.pool.read_landmarks(self.pool.landmark_rows(slots)))

    def check(self):
        self.manager.check_integrity()
        free = np.flatnonzero(self.pool.refcounts == 0)
        slots = self.pool.slots_of(free)
        assert not any(x.any() for x in self.pool.read(slots)), "a free window still holds tokens"
        rows = self.pool.landmark_rows(slots)
        assert len(rows) == SHAPE.num_landmarks * len(free)
        assert not any(x.any() for x in self.pool.read_landmarks(rows)), "a free window still holds landmarks"


def test_a_fork_shares_windows_until_it_is_dropped():
    threads = Threads()
    assert threads.manager.pages_in_use() == 5
    for ids in (IDS, FORK):
        assert threads.contents(ids) == contents_of(ids)
    threads.drop(IDS)
    assert threads.contents(FORK) == contents_of(FORK) and threads.manager.pages_in_use() == 4
    threads.drop(FORK)
    assert threads.manager.pages_in_use() == 0


spans = st.tuples(st.integers(0, NUM_TOKENS - 1), st.integers(1, NUM_TOKENS)).filter(lambda span: span[0] < span[1])


@given(span=spans, shared=st.booleans())
@example(span=(3, 15), shared=False)  # half a block and a whole one, a whole window, a block and a half
@example(span=(3, 15), shared=True)
def test_a_span_leaves_both_layers_and_the_fork_sees_nothing(span, shared):
    threads, (start, end) = Threads(), span
    if not shared:
        threads.drop(FORK)
    pool, key = threads.pool, IDS.copy()
    key[start:end] = tombstone_ids(IDS[start:end], "e", "r")
    touched = np.arange(start // SHAPE.window * SHAPE.window, -(-end // SHAPE.window) * SHAPE.window)
    with threads.manager.open_edit(IDS, start=start) as edit:
        edit.hide(start, end)
        edit.own(touched[edit.slots[touched] != NO_SLOT])
        rows = pool.landmark_rows(edit.slots[touched])
        pool.write_landmarks(rows, *states(np.full(len(rows), 7)))  # encoded anew
        threads.check()
        edit.commit(key)
    threads.check()

    kept = np.delete(IDS, np.s_[start:end])
    blocks = np.unique(kept // SHAPE.ratio)
    landmarks = np.where(np.isin(blocks * SHAPE.ratio, touched), 7, np.array(contents_of(IDS)[1])[blocks])
    assert threads.contents(key) == (contents_of(kept)[0], landmarks.tolist())
    for window in edit.slots.reshape(-1, SHAPE.window):
        if window.max() != NO_SLOT:  # what is hidden has a place in the window still
            slots = pool.slots_of(window[window != NO_SLOT][:1] // SHAPE.window)
            assert not pool.read(slots[window == NO_SLOT])[0].any()
            hidden = pool.landmark_rows(slots)[~SHAPE.blocks(window)]
            assert not pool.read_landmarks(hidden)[0].any(), "the landmark of a block without tokens"
    if shared:
        assert threads.contents(FORK) == contents_of(FORK)
    for ids in (FORK, key, IDS):
        threads.drop(ids)
    assert threads.manager.pages_in_use() == 0


def test_a_block_may_go_in_two_edits():
    threads, key = Threads(), IDS
    for entry in (2, 3):
        with threads.manager.open_edit(key, start=entry) as edit:
            key = key.copy()
            key[entry] = tombstone_ids(IDS[entry : entry + 1], "e", "r")[0]
            edit.hide(entry, entry + 1)
            edit.own(np.array([0, 1, 4, 5]))
            edit.commit(key)
        threads.check()
    row = threads.pool.landmark_rows(edit.slots[:2]) + 1
    assert not threads.pool.read_landmarks(row)[0].any()
    assert threads.contents(key)[1] == np.delete(contents_of(IDS)[1], 1).tolist()


def test_an_edit_that_fails_leaves_a_running_thread_as_it_was():
    threads = Threads()
    running = threads.manager.lease(IDS)
    with pytest.raises(RuntimeError, match="boom"), threads.manager.open_edit(IDS, start=1) as edit:
        edit.hide(1, 4)
        slots = edit.own(np.array([0, 4, 5]))
        threads.pool.write(slots, *states([7, 7, 7]))
        threads.pool.write_landmarks(np.unique(slots // SHAPE.ratio), *states([7, 7]))
        raise RuntimeError("boom")
    threads.check()
    assert threads.contents(IDS) == contents_of(IDS)
    threads.manager.release(running)
    threads.check()
