"""The public conformance suite over the embedded engine, and what only that promises."""

import numpy as np
import pytest
import torch

from kv_retract.cache.base import ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.working import WorkingSet
from kv_retract.errors import PoolExhaustedError, SpanError
from kv_retract.testing.engines import EngineConformance
from kv_retract.testing.models import FAMILIES, tiny_model
from kv_retract.testing.plain import plain_logits
from kv_retract.types import SamplingParams


class TestPageSizes(EngineConformance):
    @pytest.fixture(params=[1, 4])
    def page_size(self, request):
        return request.param

    @pytest.fixture
    def make_engine(self, page_size):
        return lambda model: HFEngine(model, max_tokens=1024, page_size=page_size, chunk_size=17)


class TestFamilies(EngineConformance):
    @pytest.fixture(params=FAMILIES)
    def model(self, request):
        return tiny_model(request.param)

    @pytest.fixture
    def page_size(self):
        return 16

    @pytest.fixture
    def make_engine(self, page_size):
        return lambda model: HFEngine(model, max_tokens=1024, page_size=page_size, chunk_size=37)


def ids_of(n, seed=0):
    return np.random.default_rng(seed).integers(3, 211, n)


def key_of(ids, extra_key=""):
    return build_key(ids, (), extra_key=extra_key)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_as_transformers_own_cache(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    engine = HFEngine(model, max_tokens=512, chunk_size=16)
    ids = ids_of(60)
    engine.extend(key_of(ids[:40]))
    with torch.inference_mode():
        first = model(input_ids=torch.from_numpy(ids[:40])[None], use_cache=True)
        own = model(input_ids=torch.from_numpy(ids[40:])[None], past_key_values=first.past_key_values)
    ours, exact = engine.extend(key_of(ids)).logits, plain_logits(tiny_model(family), ids)
    error = (ours - exact).abs().max()
    assert error <= 3 * (own.logits[0, -1:].float() - exact).abs().max() + 0.05


def test_sampling_parameters_out_of_range_are_refused():
    engine = HFEngine(tiny_model(), max_tokens=64)
    with pytest.raises(ValueError, match="top_p"):
        next(engine.generate(key_of(ids_of(20)), SamplingParams(temperature=1.0, top_p=0)))
    engine.check_integrity()


def test_memory_is_bounded_and_eviction_changes_no_answer():
    model = tiny_model()
    engine = HFEngine(model, max_tokens=200)
    for s in range(12):
        ids = ids_of(70, seed=s)
        torch.testing.assert_close(engine.extend(key_of(ids)).logits, plain_logits(model, ids), atol=1e-4, rtol=0)
        assert engine.tokens_in_use() <= 200
        engine.check_integrity()
    assert engine.cached(key_of(ids_of(70, seed=0))) == 0


def test_a_thread_that_does_not_fit_is_refused_and_nothing_is_lost():
    engine = HFEngine(tiny_model(), max_tokens=100)
    small = key_of(ids_of(40))
    engine.extend(small)
    stream = engine.generate(small, SamplingParams(max_tokens=4))
    next(stream)
    with pytest.raises(PoolExhaustedError, match="max_tokens"):
        engine.extend(key_of(ids_of(90, seed=1)))
    engine.check_integrity()
    assert len(list(stream)) == 3
    assert engine.cached(small) == 40


def test_running_out_of_pool_while_decoding_keeps_the_cache_whole():
    engine = HFEngine(tiny_model(), max_tokens=50)
    with pytest.raises(PoolExhaustedError):
        list(engine.generate(key_of(ids_of(45)), SamplingParams(max_tokens=20)))
    engine.check_integrity()
    assert engine.extend(key_of(ids_of(45))).num_cached_tokens == 44


def test_positions_past_the_model_are_refused():
    engine = HFEngine(tiny_model(), max_tokens=8192)
    key = key_of(ids_of(10))
    far = ThreadKey(key.ids, key.positions + 4090)
    with pytest.raises(ValueError, match="4100 positions"):
        engine.extend(far)
    near = ThreadKey(key.ids, key.positions + 4084)
    assert len(list(engine.generate(near, SamplingParams(max_tokens=50)))) == 2, "decoding ends at the last position"


def test_errors_name_the_entry_and_the_interval():
    engine = HFEngine(tiny_model(), max_tokens=256)
    edit = KeyEdit(start=5, end=8, exact=False, eraser_id="mask", retraction_id="r")
    with pytest.raises(SpanError, match="entry 5 .* tombstone"):
        engine.extend(build_key(ids_of(20), [edit]))
    engine.extend(key_of(ids_of(30)))
    with pytest.raises(SpanError, match="30 are"):
        engine.read_kv(key_of(ids_of(40)), 25, 35)


def test_an_answer_has_room_and_its_context_is_not_moved(monkeypatch):
    engine, key = HFEngine(tiny_model(), max_tokens=256), build_key(np.arange(3, 40), ())
    moved = []
    monkeypatch.setattr(WorkingSet, "reserve", lambda self, rows: moved.append(rows > self.k.shape[1]))
    list(engine.generate(key, SamplingParams(max_tokens=20)))
    assert len(moved) >= 20 and not any(moved)


def test_answers_that_outgrow_their_room(monkeypatch):
    monkeypatch.setattr("kv_retract.engine.hf._ANSWER_ROWS", 2)
    engine, other = (HFEngine(tiny_model(), max_tokens=512) for _ in range(2))
    key, sampling = build_key(np.arange(3, 40), ()), SamplingParams(max_tokens=60)
    for _ in range(2):
        found = [token.id for token in engine.generate(key, sampling)]
    monkeypatch.undo()
    assert found == [token.id for token in other.generate(key, sampling)]
    longer = build_key(np.concatenate([key.ids, found[:-1]]), ())
    assert engine.cached(longer) == len(longer)
    for one, two in zip(*(e.read_kv(longer, 0, len(longer)) for e in (engine, other)), strict=True):
        assert torch.equal(one, two)
    engine.check_integrity()


@pytest.mark.parametrize("forget", ["drop", "purge"])
def test_what_is_forgotten_leaves_the_memory_of_working_sets(forget):
    engine, key = HFEngine(tiny_model(), max_tokens=256), build_key(np.arange(3, 40), ())
    engine.extend(key)
    assert engine._buffers._kept
    getattr(engine, forget)(key, 5)
    assert not engine._buffers._kept
