"""Threads in two layers: what is kept where, what is shared, what an edit changes, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.bilayer import BiLayer, BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.erasers import MaskEraser, RecomputeEraser
from kv_retract.errors import ColdTombstoneError, PoolExhaustedError
from kv_retract.landmarks import LandmarkNet, PooledLandmarks
from kv_retract.testing.models import tiny_model
from kv_retract.types import SamplingParams

SMALL = BiLayer(
    window=16, ratio=4, overlap=3, local=40, sinks=2, queries=8, refill=12, landmark_positions=12, max_tokens=320
)
MASK = MaskEraser()


def ids_of(n, seed=0):
    return np.random.default_rng(seed).integers(3, 211, n)


def key_of(ids, *spans, exact=False, extra_key=""):
    edits = [KeyEdit(start=a, end=b, exact=exact, eraser_id=MASK.eraser_id, retraction_id=f"{a}-{b}") for a, b in spans]
    return build_key(ids, edits, extra_key=extra_key)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    engine = BiLayerEngine(HFEngine(model, max_tokens=600, chunk_size=13), SMALL)
    yield engine
    engine.check_integrity()


def logits(engine, key):
    return engine.extend(key, num_last=3).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_a_short_thread_is_the_inner_engines(engine, model):
    key = key_of(ids_of(40))
    close(logits(engine, key), logits(HFEngine(model, max_tokens=100), key))
    assert engine.cached(key) == 40 and engine.windows.manager.tokens_in_use() == 0
    assert [t.id for t in engine.generate(key, SamplingParams(max_tokens=3))]


@pytest.mark.parametrize(("length", "moved"), [(40, 0), (41, 1), (56, 1), (57, 2), (120, 5)])
def test_the_oldest_windows_move_and_what_is_newer_stays(engine, length, moved):
    key = key_of(ids_of(length))
    result = engine.extend(key)
    assert engine.settings.moved(length) == moved
    assert engine.windows.manager.tokens_in_use() == 16 * moved
    assert engine.inner.tokens_in_use() == length - 16 * moved
    assert (result.num_cached_tokens, result.num_prefilled_tokens) == (0, length)
    assert engine.cached(key) == length


def test_a_second_call_reads_the_newest_tokens_only(engine):
    key = key_of(ids_of(100))
    cold = logits(engine, key)
    warm = engine.extend(key, num_last=3)
    close(warm.logits, cold)
    assert (warm.num_cached_tokens, warm.num_prefilled_tokens) == (92, 8)


def test_what_is_cached_does_not_depend_on_what_was_asked_before(engine, model):
    ids = ids_of(150)
    for length in (20, 45, 90, 91, 150):
        grown = logits(engine, key_of(ids[:length]))
        fresh = BiLayerEngine(HFEngine(model, max_tokens=600, chunk_size=64), SMALL)
        close(grown, logits(fresh, key_of(ids[:length])))


@pytest.mark.parametrize("length", [41, 90, 150])
def test_pages_of_the_inner_engine_change_nothing(engine, model, length):
    paged, ids = BiLayerEngine(HFEngine(model, max_tokens=600, page_size=4), SMALL), ids_of(length)
    for n in (length - 7, length, length):
        close(logits(paged, key_of(ids[:n])), logits(engine, key_of(ids[:n])))
        paged.check_integrity()
    assert paged.cached(key_of(ids)) == length - (length - 16 * SMALL.moved(length)) % 4
    paged.purge(key_of(ids), 3)
    paged.drop(key_of(ids), 0)
    assert paged.tokens_in_use() == 0


def test_an_answer_is_read_again_as_part_of_the_next_thread(engine):
    key = key_of(ids_of(90))
    answer = [t.id for t in engine.generate(key, SamplingParams(max_tokens=5))]
    assert answer[0] == int(engine.extend(key).logits[-1].argmax())
    longer = key_of(np.append(key.ids, answer).astype(np.int64))
    assert engine.cached(longer) == 90 and engine.extend(longer).num_prefilled_tokens == 8
    assert engine.cached(longer) == 95


def test_closing_an_answer_unlocks_the_windows(engine):
    key = key_of(ids_of(100))
    stream = engine.generate(key, SamplingParams(max_tokens=5))
    next(stream)
    assert engine.windows.manager.index.protected_size == 64
    stream.close()
    assert engine.windows.manager.index.protected_size == 0
    engine.drop(key, 0)
    assert engine.tokens_in_use() == 0


def test_forks_share_windows_and_part_where_they_differ(engine, model):
    ids, other = ids_of(100), ids_of(100)
    other[70:] = ids_of(30, seed=1)
    first, second = logits(engine, key_of(ids)), engine.extend(key_of(other), num_last=3)
    assert engine.windows.manager.tokens_in_use() == 64 and second.num_cached_tokens == 70
    fresh = BiLayerEngine(HFEngine(model, max_tokens=600), SMALL)
    close(second.logits, logits(fresh, key_of(other)))
    close(first, logits(engine, key_of(ids)))


def test_namespaces_share_nothing(engine):
    engine.extend(key_of(ids_of(100)))
    assert engine.cached(key_of(ids_of(100), extra_key="tenant")) == 0


def test_least_recently_used_windows_go_where_the_budget_ends(engine):
    keys = [key_of(ids_of(140, seed)) for seed in range(4)]  # 7 windows each, room for 20
    found = [logits(engine, key) for key in keys]
    assert engine.windows.manager.tokens_in_use() <= 320
    assert engine.cached(keys[3]) == 140 and engine.cached(keys[0]) < 112
    close(found[0], logits(engine, keys[0]))


def test_a_thread_that_does_not_fit_is_refused_and_the_rest_stays(engine):
    small = key_of(ids_of(100))
    engine.extend(small)
    with pytest.raises(PoolExhaustedError, match="max_tokens"):
        engine.extend(key_of(ids_of(400, 1)))
    engine.check_integrity()
    assert engine.extend(small).logits.isfinite().all()


@pytest.mark.parametrize("spans", [[(20, 25)], [(0, 3)], [(14, 40)], [(16, 32)], [(5, 9), (50, 52)]])
def test_a_steered_span_leaves_both_layers_of_its_windows(engine, spans):
    ids = ids_of(120)  # 5 windows
    old, new = key_of(ids), key_of(ids, *spans)
    engine.extend(old)
    before = {w: engine.windows.pool.read(slots_of(engine, old)[16 * w :][:16])[0] for w in range(5)}
    result = engine.erase(old, spans, MASK, new)
    assert (result.tokens_erased, result.exact) == (sum(b - a for a, b in spans), False)
    engine.check_integrity()
    slots, touched = slots_of(engine, new), {w for a, b in spans for w in range(a // 16, (b - 1) // 16 + 1)}
    assert [i for i in range(80) if slots[i] == -1] == [i for a, b in spans for i in range(a, b)]
    first = min(touched)
    for window in range(5):
        rows = slots[16 * window :][:16]
        if window not in touched:
            assert torch.equal(engine.windows.pool.read(rows)[0], before[window]), "later windows are left"
    # The first window that was touched is what it would be had the span never been there.
    visible = [i for i in range(16 * first, 16 * first + 16) if slots[i] != -1]
    if visible:
        alone = BiLayerEngine(HFEngine(engine.model, max_tokens=600), SMALL)
        alone.extend(key_of(np.concatenate([ids[: 16 * first], ids[visible], ids_of(100, 7)])))
        wanted = alone.windows.pool.read(slots_of(alone, key_of(np.concatenate(
            [ids[: 16 * first], ids[visible], ids_of(100, 7)])))[16 * first :][: len(visible)])  # fmt: skip
        close(engine.windows.pool.read(slots[visible])[0], wanted[0])
    assert engine.cached(new) == 80 and engine.cached(old) == 16 * first
    assert engine.extend(new).logits.isfinite().all()


def test_a_fork_that_keeps_the_span_keeps_its_windows(engine):
    ids = ids_of(120)
    old, fork = key_of(ids), key_of(np.concatenate([ids[:110], ids_of(30, 5)]))
    expected = logits(engine, fork)
    engine.extend(old)
    result = engine.erase(old, [(20, 25)], MASK, key_of(ids, (20, 25)))
    assert result.slots_copied == 16
    close(logits(engine, fork), expected)


def test_an_exact_span_is_gone_at_once(engine, model):
    ids = ids_of(120)
    old, new = key_of(ids), key_of(ids, (20, 25), exact=True)
    engine.extend(old)
    result = engine.erase(old, [(20, 25)], RecomputeEraser(), new)
    assert result.exact and result.tokens_recomputed == 64
    assert engine.cached(old) == 16
    close(logits(engine, new), logits(BiLayerEngine(HFEngine(model, max_tokens=600), SMALL), new))


def test_a_span_in_the_local_part_is_left_out(engine):
    ids = ids_of(100)
    old, new = key_of(ids), key_of(ids, (70, 75))
    engine.extend(old)
    assert engine.erase(old, [(70, 75)], MASK, new).exact
    assert engine.cached(new) == 70
    with pytest.raises(ColdTombstoneError, match="entry 70"):
        engine.extend(new)
    assert engine.extend(key_of(ids, (70, 75), exact=True)).num_cached_tokens == 70


def test_a_cold_tombstone_in_a_window_is_refused(engine):
    with pytest.raises(ColdTombstoneError, match="entry 20"):
        engine.extend(key_of(ids_of(100), (20, 25)))
    assert engine.windows.manager.tokens_in_use() <= 16 and engine.windows.manager.index.protected_size == 0


def test_purge_takes_every_path_that_read_the_entry(engine):
    ids = ids_of(120)
    forks = [key_of(np.concatenate([ids[:n], ids_of(120 - n, n)])) for n in (30, 60, 90, 120)]
    for key in (*forks, key_of(ids[:50]), key_of(ids[:30])):
        engine.extend(key)
    engine.purge(key_of(ids), 40)
    kept = [engine.cached(key) for key in forks]
    assert kept[0] == 120, "this fork never read the entry"
    assert all(n <= 40 for n in kept[1:]) and engine.cached(key_of(ids[:50])) <= 40
    assert engine.cached(key_of(ids[:30])) == 30


@pytest.mark.parametrize("trained", [False, True])
def test_the_device_holds_landmarks_and_the_budget_whatever_the_length(model, trained):
    """But for L1, nothing on the device grows with the thread; L2 is not there."""
    landmarks = LandmarkNet.for_model(model).requires_grad_(False) if trained else PooledLandmarks()
    most = SMALL.sinks + SMALL.refill + SMALL.overlap + SMALL.local
    for length in (60, 150, 310):
        engine = BiLayerEngine(HFEngine(model, max_tokens=600), SMALL, landmarks=landmarks)
        answering, _, lease = engine._answering(key_of(ids_of(length)), 1)
        count = SMALL.moved(length) * 4
        assert answering.rows <= most + count * trained
        assert engine.inner.tokens_in_use() <= SMALL.local
        assert engine.windows.pool.landmark_k.shape[1] == 320 // 4
        assert len(answering._parts.landmarks) == count
        engine.windows.manager.release(lease)


def test_refreshing_chooses_again_while_decoding(model):
    refreshing = BiLayerEngine(HFEngine(model, max_tokens=600), BiLayer(**{**vars_of(SMALL), "refresh": 2}))
    key = key_of(ids_of(120))
    assert len(list(refreshing.generate(key, SamplingParams(max_tokens=7)))) == 7
    refreshing.check_integrity()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ratio": 5}, "multiple of the ratio"), ({"local": 20}, "outside of windows"), ({"rounds": 0}, "rounds")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BiLayer(**{**vars_of(SMALL), **change})


def test_a_layout_beyond_the_models_positions_is_refused(model):
    with pytest.raises(ValueError, match="4096"):
        BiLayerEngine(HFEngine(model, max_tokens=600), BiLayer(local=4000))


def test_last_entries_outside_of_the_local_part_are_refused(engine):
    with pytest.raises(ValueError, match="local part"):
        engine.extend(key_of(ids_of(100)), num_last=37)


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def slots_of(engine, key):
    return engine.windows.manager.index.match_prefix(key.ids, extra_key=key.extra_key).slots


class Walk(RuleBasedStateMachine):
    """Threads grow, fork, are erased and forgotten; whatever stays cached answers as a cold engine does."""

    @initialize()
    def start(self):
        self.engine = BiLayerEngine(HFEngine(self.model, max_tokens=160, chunk_size=16), SMALL)
        self.threads = [list(ids_of(10))]
        self.edits = [[]]
        self.count = 10

    def key(self, n):
        return build_key(np.array(self.threads[n]), self.edits[n])

    def pick(self, data):
        return data.draw(st.integers(0, len(self.threads) - 1))

    @rule(data=st.data(), n=st.integers(1, 30))
    def grow(self, data, n):
        t = self.pick(data)
        if len(self.threads[t]) < 180:
            self.count += 1
            self.threads[t] += list(ids_of(n, self.count))

    @rule(data=st.data())
    def fork(self, data):
        t = self.pick(data)
        if len(self.threads) < 4:
            self.threads.append(list(self.threads[t]))
            self.edits.append(list(self.edits[t]))

    @rule(data=st.data())
    def extend(self, data):
        t = self.pick(data)
        key = self.thaw(t)
        found = self.engine.extend(key).logits
        if all(e.exact for e in self.edits[t]):
            close(found, BiLayerEngine(HFEngine(self.model, max_tokens=400), SMALL).extend(key).logits)

    @rule(data=st.data(), exact=st.booleans(), start=st.floats(0, 0.9), n=st.integers(1, 20))
    def erase(self, data, exact, start, n):
        t = self.pick(data)
        size = len(self.threads[t])
        a = int(start * size)
        b = min(a + n, size - 1)
        if b <= a or any(e.start < b and a < e.end for e in self.edits[t]):
            return
        old = self.thaw(t)
        shift = sum(e.end - e.start for e in self.edits[t] if e.exact and e.end <= a)
        eraser = RecomputeEraser() if exact else MASK
        edit = KeyEdit(start=a, end=b, exact=exact, eraser_id=eraser.eraser_id, retraction_id=f"r{self.count}")
        behind = [
            KeyEdit(start=e.start, end=e.end, exact=e.exact or (exact and e.start > a), eraser_id=e.eraser_id,
                    retraction_id=e.retraction_id)
            for e in self.edits[t]
        ]  # fmt: skip
        self.edits[t] = sorted([*behind, edit], key=lambda e: e.start)
        self.engine.erase(old, [(a - shift, b - shift)], eraser, self.key(t))

    @rule(data=st.data(), part=st.floats(0, 1), branches=st.booleans())
    def forget(self, data, part, branches):
        key = self.key(self.pick(data))
        (self.engine.purge if branches else self.engine.drop)(key, int(part * (len(key) - 1)))

    def thaw(self, t):
        """Leave out what is no longer cached as tombstones, as a session does."""
        while True:
            key = self.key(t)
            cached = min(self.engine.cached(key), len(key) - 1)
            shift, cold = 0, None
            for n, e in enumerate(self.edits[t]):
                if e.exact:
                    shift += e.end - e.start
                elif e.end - shift > cached:
                    cold = n
                    break
            if cold is None:
                return key
            e = self.edits[t][cold]
            self.edits[t][cold] = KeyEdit(start=e.start, end=e.end, exact=True)

    @invariant()
    def both_caches_are_whole(self):
        self.engine.check_integrity()


def test_whatever_happens_the_cache_is_whole_and_answers_as_a_cold_one(model):
    machine = type("Machine", (Walk,), {"model": model})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
