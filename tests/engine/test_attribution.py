"""Shares of attention from the cache, against eager attention of plain transformers on the whole thread."""

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional

from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.attribution import StrongestShares
from kv_retract.engine.base import SupportsAttribution
from kv_retract.engine.hf import HFEngine
from kv_retract.erasers import MaskEraser, NoneEraser, ShiftEraser
from kv_retract.errors import SpanError, UnsupportedError
from kv_retract.testing.models import FAMILIES, tiny_model

N, SPAN = 60, (10, 17)


def ids_of(n=N, seed=0):
    return np.random.default_rng(seed).integers(3, 211, n)


def key_of(ids):
    return build_key(ids, ())


def cached_engine(model, key, **options):
    engine = HFEngine(model, max_tokens=256, **options)
    engine.extend(key)
    return engine


@torch.inference_mode()
def plain_shares(model, ids, span, entries, hidden=None, positions=None):
    """The slow twin: every weight of every head of one eager pass over the whole thread, then sum and maximum."""
    model.set_attn_implementation("eager")
    n = len(ids)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    if hidden:
        seen[hidden[1] :, slice(*hidden)] = False
    mask = torch.zeros(n, n).masked_fill_(~seen, torch.finfo(torch.float32).min)[None, None]
    try:
        weights = model(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(np.arange(n) if positions is None else positions)[None],
            attention_mask=mask,
            output_attentions=True,
        ).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return torch.cat(weights)[:, :, entries, span[0] : span[1]].sum(-1).amax((0, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_shares_are_those_of_eager_attention_on_the_whole_thread(family, chunk_size):
    model, key = tiny_model(family), key_of(ids_of())
    entries = np.array([17, 18, 19, 30, 31, 32, 33, 47, 48, 59])
    engine = cached_engine(model, key, chunk_size=chunk_size)
    got, wanted = engine.attention(key, SPAN, entries), plain_shares(model, key.ids, SPAN, entries)
    error = (got - wanted).abs()
    print(f"{family}: max {error.max():.1e}, mean {error.mean():.1e}")
    assert got.dtype == torch.float32 and got.shape == (10,)
    assert error.max() < 1e-5
    assert wanted.max() - wanted.min() > 0.05, "shares that are all the same would prove nothing"


@pytest.mark.parametrize("at", [30, N - 1])
def test_one_token_alone_gives_what_it_gives_among_others(at):
    """Transformers packs the heads of a single query in another shape, and leaves out the mask of the newest token."""
    model, key = tiny_model(), key_of(ids_of())
    engine = cached_engine(model, key)
    alone = engine.attention(key, SPAN, np.array([at]))
    torch.testing.assert_close(alone, plain_shares(model, key.ids, SPAN, [at]), atol=1e-5, rtol=0)


def test_bfloat16_is_close_to_float32():
    key, entries = key_of(ids_of()), np.arange(20, N)
    engine = cached_engine(tiny_model(dtype=torch.bfloat16), key)
    exact = plain_shares(tiny_model(), key.ids, SPAN, entries)
    got = engine.attention(key, SPAN, entries)
    assert got.dtype == torch.float32
    assert (got - exact).abs().mean() < 0.05


def test_nothing_changes_in_the_cache_or_in_the_model():
    model, key = tiny_model(), key_of(ids_of())
    engine = cached_engine(model, key)
    before, used = engine.read_kv(key, 0, N), engine.tokens_in_use()
    engine.attention(key, SPAN, np.arange(20, 50))
    engine.check_integrity()
    assert engine.tokens_in_use() == used and engine.cached(key) == N
    for was, now in zip(before, engine.read_kv(key, 0, N), strict=True):
        assert torch.equal(was, now)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("eraser", [MaskEraser(), ShiftEraser(), NoneEraser()], ids=lambda e: e.eraser_id)
def test_tombstones_count_as_far_as_they_are_visible(eraser):
    model, ids, erased = tiny_model(), ids_of(), (20, 28)
    edit = KeyEdit(
        start=20, end=28, exact=False, eraser_id=eraser.eraser_id, retraction_id="r", closes_gap=eraser.closes_gap
    )
    key, entries = build_key(ids, [edit]), np.arange(30, N)
    # Nothing behind the span has seen it, so a plain pass with the same mask is the exact twin.
    engine = cached_engine(model, key_of(ids[:28]))
    engine.erase(key_of(ids[:28]), [erased], eraser, key.cut(28))
    engine.extend(key)
    hidden = None if isinstance(eraser, NoneEraser) else erased
    for span in (SPAN, erased, (15, 29)):
        wanted = plain_shares(model, ids, span, entries, hidden=hidden, positions=key.positions)
        torch.testing.assert_close(engine.attention(key, span, entries), wanted, atol=1e-5, rtol=0)
    assert bool(engine.attention(key, erased, entries).any()) == (hidden is None)
    with pytest.raises(SpanError, match="entry 27 is a tombstone"):
        engine.attention(key, SPAN, np.array([27, 28]))


@pytest.mark.parametrize("page_size", [1, 16])
def test_what_is_not_cached_has_no_answer_and_is_not_prefilled(page_size):
    key = key_of(ids_of())
    engine = cached_engine(tiny_model(), key.cut(40), page_size=page_size)
    end = engine.cached(key)
    assert end == 40 // page_size * page_size
    assert engine.attention(key, SPAN, np.array([20, end])) is None
    assert len(engine.attention(key, SPAN, np.array([20, end - 1]))) == 2
    assert engine.cached(key) == end


@pytest.mark.parametrize(
    "span, entries",
    [
        ((10, 17), [16, 20]),
        ((10, 10), [16, 20]),
        ((-1, 5), [16, 20]),
        ((10, 17), [20, 20]),
        ((10, 17), [21, 20]),
        ((10, 17), [20, N]),
        ((10, 17), []),
    ],
)
def test_a_span_that_is_not_before_ascending_entries_is_refused(span, entries):
    key = key_of(ids_of())
    engine = cached_engine(tiny_model(), key)
    with pytest.raises(SpanError, match="expected ascending entries of a key of 60 behind the span"):
        engine.attention(key, span, np.array(entries, dtype=np.int64))


def test_a_model_that_hides_its_attention_is_refused():
    key, model = key_of(ids_of()), tiny_model()
    engine = cached_engine(model, key)
    assert isinstance(engine, SupportsAttribution)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="0 of the model's 3 layers.*sdpa"):
        engine.attention(key, SPAN, np.array([20, 21]))


def test_other_threads_are_not_watched():
    query = torch.zeros(1, 2, 3, 4)
    with StrongestShares((0, 1), 3) as seen:
        other = threading.Thread(target=functional.scaled_dot_product_attention, args=(query, query, query))
        other.start()
        other.join()
        assert not seen.layers
        functional.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(seen.layers[0], torch.full((3,), 1 / 3))
