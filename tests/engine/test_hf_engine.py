"""The embedded engine against plain transformers."""

import itertools
import threading

import numpy as np
import pytest
import torch

from kv_retract.cache.base import ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.hf import HFEngine
from kv_retract.errors import PoolExhaustedError, SpanError
from kv_retract.testing.models import FAMILIES, tiny_model
from kv_retract.types import SamplingParams


def ids_of(n, seed=0):
    return np.random.default_rng(seed).integers(3, 211, n)


def key_of(ids, extra_key=""):
    return build_key(ids, (), extra_key=extra_key)


@torch.inference_mode()
def plain(model, ids, num_last=1):
    return model(input_ids=torch.from_numpy(np.asarray(ids))[None], use_cache=False).logits[0, -num_last:].float()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_plain_transformers_with_and_without_hits(family, page_size):
    model = tiny_model(family)
    engine = HFEngine(model, max_tokens=1024, page_size=page_size, chunk_size=37)
    ids, other = ids_of(150), np.concatenate([ids_of(150)[:90], ids_of(60, seed=1)])
    cold = engine.extend(key_of(ids), num_last=5)
    assert cold.num_cached_tokens == 0 and cold.num_prefilled_tokens == 150
    torch.testing.assert_close(cold.logits, plain(model, ids, 5), atol=1e-4, rtol=0)
    warm = engine.extend(key_of(ids), num_last=5)
    assert warm.num_cached_tokens == (145 if page_size == 1 else 144)
    torch.testing.assert_close(warm.logits, plain(model, ids, 5), atol=1e-4, rtol=0)
    shared = engine.extend(key_of(other))
    assert shared.num_cached_tokens == 90 // page_size * page_size
    torch.testing.assert_close(shared.logits, plain(model, other), atol=1e-4, rtol=0)
    assert engine.extend(key_of(ids, "tenant")).num_cached_tokens == 0
    engine.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_as_transformers_own_cache(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    engine = HFEngine(model, max_tokens=512, chunk_size=16)
    ids = ids_of(60)
    engine.extend(key_of(ids[:40]))
    with torch.inference_mode():
        first = model(input_ids=torch.from_numpy(ids[:40])[None], use_cache=True)
        own = model(input_ids=torch.from_numpy(ids[40:])[None], past_key_values=first.past_key_values)
    ours, exact = engine.extend(key_of(ids)).logits, plain(tiny_model(family), ids)
    error = (ours - exact).abs().max()
    assert error <= 3 * (own.logits[0, -1:].float() - exact).abs().max() + 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_generate(family):
    model = tiny_model(family)
    engine = HFEngine(model, max_tokens=512)
    ids = ids_of(40)
    expected = model.generate(torch.from_numpy(ids)[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
    tokens = list(engine.generate(key_of(ids), SamplingParams(max_tokens=12)))
    assert [t.id for t in tokens] == expected[0, 40:].tolist()
    assert [t.finish_reason for t in tokens] == [None] * 11 + ["length"]
    grown = np.concatenate([ids, expected[0, 40:].numpy()])
    assert engine.cached(key_of(grown)) == 51, "what was decoded stays cached, but for the last token, which never ran"


def test_sampling_is_seeded_and_respects_its_parameters():
    engine = HFEngine(tiny_model(), max_tokens=512)
    key = key_of(ids_of(20))

    def draw(**kw):
        return [t.id for t in engine.generate(key, SamplingParams(max_tokens=10, **kw))]

    assert draw(temperature=1.0, seed=7) == draw(temperature=1.0, seed=7)
    assert len({tuple(draw(temperature=1.5, seed=s)) for s in range(5)}) > 1
    assert draw(temperature=2.0, top_k=1, seed=3) == draw()
    assert draw(temperature=2.0, top_p=1e-6, seed=3) == draw()
    with pytest.raises(ValueError, match="top_p"):
        draw(temperature=1.0, top_p=0)


def test_stop_token_ends_the_answer_and_logprobs_are_log_softmax():
    model = tiny_model()
    engine = HFEngine(model, max_tokens=512)
    ids = ids_of(20)
    first, second = itertools.islice(engine.generate(key_of(ids), SamplingParams(max_tokens=5, logprobs=True)), 2)
    assert first.logprob == pytest.approx(float(plain(model, ids)[0].log_softmax(-1)[first.id]), abs=1e-4)
    tokens = list(engine.generate(key_of(ids), SamplingParams(max_tokens=5, stop_token_ids=(second.id,))))
    assert [t.finish_reason for t in tokens] == [None, "stop"]


def test_streams_of_several_threads_interleave():
    engine = HFEngine(tiny_model(), max_tokens=1024)
    keys = [key_of(np.concatenate([ids_of(30), ids_of(5, seed=s)])) for s in range(1, 5)]
    alone = [[t.id for t in engine.generate(k, SamplingParams(max_tokens=8))] for k in keys]
    engine.drop(keys[0], 0)
    together = list(zip(*(engine.generate(k, SamplingParams(max_tokens=8)) for k in keys), strict=True))
    assert [[t.id for t in stream] for stream in zip(*together, strict=True)] == alone
    engine.check_integrity()


def test_python_threads_may_share_an_engine():
    engine = HFEngine(tiny_model(), max_tokens=2048)
    keys = [key_of(np.concatenate([ids_of(20), ids_of(10, seed=s)])) for s in range(6)]
    alone = [[t.id for t in engine.generate(k, SamplingParams(max_tokens=6))] for k in keys]
    results = [None] * len(keys)

    def work(i):
        results[i] = [t.id for t in engine.generate(keys[i], SamplingParams(max_tokens=6))]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(keys))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert results == alone
    engine.check_integrity()


def test_closing_a_stream_keeps_what_was_decoded_and_leaks_nothing():
    engine = HFEngine(tiny_model(), max_tokens=256)
    ids = ids_of(20)
    stream = engine.generate(key_of(ids), SamplingParams(max_tokens=50))
    got = [next(stream).id for _ in range(5)]
    stream.close()
    engine.check_integrity()
    assert engine.cached(key_of(np.concatenate([ids, got]))) == 24


def test_memory_is_bounded_and_eviction_changes_no_answer():
    model = tiny_model()
    engine = HFEngine(model, max_tokens=200)
    for s in range(12):
        ids = ids_of(70, seed=s)
        torch.testing.assert_close(engine.extend(key_of(ids)).logits, plain(model, ids), atol=1e-4, rtol=0)
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


def test_a_cold_tombstone_never_reaches_the_model():
    engine = HFEngine(tiny_model(), max_tokens=256)
    edit = KeyEdit(start=5, end=8, exact=False, eraser_id="mask", retraction_id="r")
    with pytest.raises(SpanError, match="entry 5 .* tombstone"):
        engine.extend(build_key(ids_of(20), [edit]))
    engine.check_integrity()
    assert engine.tokens_in_use() == 0


def test_positions_past_the_model_are_refused():
    engine = HFEngine(tiny_model(), max_tokens=8192)
    key = key_of(ids_of(10))
    far = ThreadKey(key.ids, key.positions + 4090)
    with pytest.raises(ValueError, match="4100 positions"):
        engine.extend(far)
    near = ThreadKey(key.ids, key.positions + 4084)
    assert len(list(engine.generate(near, SamplingParams(max_tokens=50)))) == 2, "decoding ends at the last position"


def test_read_and_write_kv_round_trip():
    engine = HFEngine(tiny_model(), max_tokens=256)
    key = key_of(ids_of(30))
    engine.extend(key)
    k, v = engine.read_kv(key, 10, 20)
    assert k.shape == v.shape == (3, 10, 2, 12)
    engine.write_kv(key, 10, 20, k * 2, v)
    torch.testing.assert_close(engine.read_kv(key, 10, 20)[0], k * 2)
    with pytest.raises(SpanError, match="30 are"):
        engine.read_kv(key_of(ids_of(40)), 25, 35)
