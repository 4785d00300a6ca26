"""Erasers against slow exact twins: plain transformers, whole forward passes, no paging."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kv_retract.cache.base import ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.hf import HFEngine
from kv_retract.erasers import (
    ErratumEraser,
    InPlaceEraser,
    MaskEraser,
    NoneEraser,
    RecomputeEraser,
    RepairEraser,
    SelectiveEraser,
    ShiftEraser,
)
from kv_retract.testing.erasers import SPANS, erase, keys_for, thread_ids
from kv_retract.testing.models import FAMILIES, tiny_model

NEW = thread_ids(7, seed=3)


def grown(key):
    """The key with a new message behind it."""
    return ThreadKey(
        np.concatenate([key.ids, NEW]), np.concatenate([key.positions, key.next_position + np.arange(len(NEW))])
    )


def keep(spans, n=80):
    mask = np.ones(n, dtype=bool)
    for start, end in spans:
        mask[start:end] = False
    return np.flatnonzero(mask)


@torch.inference_mode()
def run(model, ids, cache, positions):
    out = model(
        input_ids=torch.from_numpy(ids)[None], position_ids=torch.from_numpy(positions)[None],
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    return out.logits[0].float()


def report(name, got, want, tolerance):
    difference = (got - want).abs()
    print(f"{name}: max {difference.max():.2e} mean {difference.mean():.2e}")
    assert float(difference.max()) <= tolerance


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_equals_a_fresh_prefill_without_the_span(family, where, page_size):
    model, ids, spans = tiny_model(family), thread_ids(), SPANS[where]
    engine = HFEngine(model, max_tokens=512, page_size=page_size)
    new, result = erase(engine, ids, spans, RecomputeEraser())
    left = ids[keep(spans)]
    want = run(model, np.concatenate([left, NEW]), DynamicCache(), np.arange(len(left) + len(NEW)))
    report("logits", engine.extend(grown(new), num_last=7).logits, want[-7:], 1e-4)
    assert result.tokens_recomputed <= 80 - spans[0][0]
    fresh = HFEngine(model, max_tokens=512, page_size=page_size)
    fresh.extend(build_key(left, ()))
    cached = min(engine.cached(new), fresh.cached(build_key(left, ())))
    for got, wanted in zip(engine.read_kv(new, 0, cached), fresh.read_kv(new, 0, cached), strict=True):
        report("kv", got, wanted, 1e-4)


@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_equals_a_fresh_prefill_with_a_gap_in_positions(family, where):
    model, ids, spans = tiny_model(family), thread_ids(), SPANS[where]
    engine = HFEngine(model, max_tokens=512, chunk_size=13)
    new, result = erase(engine, ids, spans, InPlaceEraser())
    kept = keep(spans)
    places = np.concatenate([kept, 80 + np.arange(len(NEW))])
    want = run(model, np.concatenate([ids[kept], NEW]), DynamicCache(), places)
    report("logits", engine.extend(grown(new), num_last=7).logits, want[-7:], 1e-4)
    assert result.tokens_recomputed == len(kept) - spans[0][0] and new.next_position == 80


@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_equals_dropping_the_rows_from_a_dynamic_cache(family, where):
    model, ids, spans = tiny_model(family), thread_ids(), SPANS[where]
    engine = HFEngine(model, max_tokens=512)
    new, _ = erase(engine, ids, spans, MaskEraser())
    cache, kept = DynamicCache(), torch.from_numpy(keep(spans))
    run(model, ids, cache, np.arange(80))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    want = run(model, NEW, cache, 80 + np.arange(len(NEW)))
    report("logits", engine.extend(grown(new), num_last=7).logits, want, 1e-4)


@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shifted_keys_equal_freshly_rotated_ones(family, where):
    """Layer 0 sees no context, so its keys tell position and token only: shifted ones must equal a fresh prefill's."""
    model, ids, spans = tiny_model(family), thread_ids(), SPANS[where]
    engine, fresh = HFEngine(model, max_tokens=512), HFEngine(model, max_tokens=512)
    new, result = erase(engine, ids, spans, ShiftEraser())
    left = build_key(ids[keep(spans)], ())
    fresh.extend(left)
    (k, v), (k0, v0) = engine.read_kv(new, 0, len(new)), fresh.read_kv(left, 0, len(left))
    assert k.shape == k0.shape
    scale = k0[0].abs().max()
    report("layer 0 keys", k[0] / scale, k0[0] / scale, 1e-5)
    report("layer 0 values", v[0], v0[0], 1e-5)
    assert result.tokens_moved == len(left) - spans[0][0]
    assert new.next_position == len(left)


def test_shift_is_exact_far_out_where_float32_angles_are_coarse():
    model, ids = tiny_model(), thread_ids(4000)
    engine, fresh = HFEngine(model, max_tokens=8192), HFEngine(model, max_tokens=8192)
    new, _ = erase(engine, ids, [(100, 164)], ShiftEraser())
    left = build_key(np.delete(ids, np.s_[100:164]), ())
    fresh.extend(left)
    k, k0 = engine.read_kv(new, 3000, 4000)[0][0], fresh.read_kv(left, 2936, 3936)[0][0]
    report("layer 0 keys", k / k0.abs().max(), k0 / k0.abs().max(), 1e-5)


@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize(
    ("limit", "same"), [(RepairEraser(tokens=0), ShiftEraser()), (SelectiveEraser(ratio=0), ShiftEraser())]
)
def test_repairing_nothing_is_shift(limit, same, where):
    states = []
    for eraser in (limit, same):
        engine = HFEngine(tiny_model(), max_tokens=512)
        new, _ = erase(engine, thread_ids(), SPANS[where], eraser)
        states.append(engine.extend(grown(new)).logits)
    assert torch.equal(*states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", SPANS)
@pytest.mark.parametrize("eraser", [RepairEraser(tokens=1000), SelectiveEraser(ratio=1)], ids=lambda e: e.name)
def test_repairing_everything_is_recompute(eraser, where, family):
    logits = []
    for e in (eraser, RecomputeEraser()):
        engine = HFEngine(tiny_model(family), max_tokens=512, chunk_size=13)
        new, _ = erase(engine, thread_ids(), SPANS[where], e)
        logits.append(engine.extend(grown(new), num_last=7).logits)
    report("logits", *logits, 1e-4)


@torch.inference_mode()
def test_repair_recomputes_just_the_first_tokens_after_the_span():
    """Twin: shift the cache by hand, run four tokens over the prefix, put their KV in place of the old."""
    model, ids = tiny_model("llama"), thread_ids()
    engine = HFEngine(model, max_tokens=512)
    new, result = erase(engine, ids, [(20, 27)], RepairEraser(tokens=4))
    assert result.tokens_recomputed == 4
    shifted = HFEngine(model, max_tokens=512)
    moved, _ = erase(shifted, ids, [(20, 27)], ShiftEraser())
    prefix = DynamicCache()
    run(model, ids[:20], prefix, np.arange(20))
    run(model, ids[27:31], prefix, 20 + np.arange(4))
    k, v = engine.read_kv(new, 0, 80)
    k0, v0 = shifted.read_kv(moved, 0, 80)
    for layer, cached in enumerate(prefix.layers):
        k0[layer, 20:24] = cached.keys[0, :, 20:24].transpose(0, 1)
        v0[layer, 20:24] = cached.values[0, :, 20:24].transpose(0, 1)
    report("keys", k, k0, 1e-5)
    report("values", v, v0, 1e-5)


def test_selective_recomputes_the_tokens_that_moved_most():
    ids, chosen = thread_ids(), 6
    shift, full, some = (HFEngine(tiny_model(), max_tokens=512) for _ in range(3))
    moved, _ = erase(shift, ids, [(20, 27)], ShiftEraser())
    exact, _ = erase(full, ids, [(20, 27)], RecomputeEraser())
    new, result = erase(some, ids, [(20, 27)], SelectiveEraser(ratio=chosen / 53))
    assert result.tokens_recomputed == chosen
    before = torch.cat(shift.read_kv(moved, 27, 80), -1)[1].flatten(1)
    target = torch.cat(full.read_kv(exact, 20, 73), -1)[1].flatten(1)
    after = torch.cat(some.read_kv(new, 27, 80), -1)[1].flatten(1)
    deviation = (target - before).norm(dim=1) / before.norm(dim=1)
    changed = set(((after - before).norm(dim=1) > 1e-4).nonzero()[:, 0].tolist())
    assert changed == set(deviation.topk(chosen).indices.tolist())


@pytest.mark.parametrize("eraser", [NoneEraser(), ErratumEraser()], ids=lambda e: e.name)
def test_controls_change_no_kv(eraser):
    engine = HFEngine(tiny_model(), max_tokens=512)
    old, _ = keys_for(thread_ids(), [(20, 27)], eraser)
    before = engine.extend(grown(old), num_last=7).logits
    kv = engine.read_kv(old, 0, 80)
    new, result = erase(engine, thread_ids(), [(20, 27)], eraser)
    assert (result.slots_copied, result.tokens_recomputed, result.tokens_moved) == (0, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(kv, engine.read_kv(new, 0, 80), strict=True))
    torch.testing.assert_close(engine.extend(grown(new), num_last=7).logits, before, atol=1e-4, rtol=0)


def test_an_eraser_that_fails_half_way_leaves_no_half_edit():
    class Broken(ShiftEraser):
        """Fake: fails after it has moved keys."""

        name = "broken"

        def erase(self, view):
            super().erase(view)
            raise RuntimeError("half way")

    model = tiny_model()
    engine = HFEngine(model, max_tokens=512)
    old, new = keys_for(thread_ids(), [(20, 27)], Broken())
    engine.extend(old)
    with pytest.raises(RuntimeError, match="half way"):
        engine.erase(old, [(20, 27)], Broken(), new)
    engine.check_integrity()
    assert engine.cached(new) <= 20
    want = run(model, np.concatenate([thread_ids(), NEW]), DynamicCache(), np.arange(87))[-1:]
    report("logits", engine.extend(grown(old)).logits, want, 1e-4)


def test_an_eraser_that_lies_about_positions_is_caught():
    class Liar(MaskEraser):
        """Fake: closes the gap in the key only."""

        name = "liar"
        closes_gap = True

    engine = HFEngine(tiny_model(), max_tokens=512)
    with pytest.raises(ValueError, match="closes_gap"):
        erase(engine, thread_ids(), [(20, 27)], Liar())
    engine.check_integrity()


def test_erased_text_leaves_no_states_in_memory():
    engine = HFEngine(tiny_model(), max_tokens=128)
    old, new = keys_for(thread_ids(), [(20, 27)], MaskEraser())
    engine.extend(old)
    k, _ = engine.read_kv(old, 20, 27)
    engine.erase(old, [(20, 27)], MaskEraser(), new)
    pool = engine.manager.pool.k.transpose(0, 1).flatten(1)
    assert not any(bool((pool == row).all(dim=1).any()) for row in k.transpose(0, 1).flatten(1))


def test_a_span_that_eviction_cut_in_half_goes_as_a_whole():
    engine = HFEngine(tiny_model(), max_tokens=512)
    old = build_key(thread_ids(), ())
    engine.extend(ThreadKey(old.ids[:24], old.positions[:24]))
    edit = KeyEdit(start=20, end=27, exact=False, eraser_id="mask", retraction_id="r20")
    result = engine.erase(old, [(20, 27)], MaskEraser(), build_key(thread_ids(), [edit]))
    assert result.exact and result.tokens_erased == 0
    assert engine.cached(old) == 20
    engine.check_integrity()
