"""The learned eraser on the paged cache against its twins: two-phase with gradients, and one plain masked pass."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kv_retract.cache.base import EditView, ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.edit import HFEditView
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.support import inspect_model
from kv_retract.engine.working import additive_mask, cache_argument_of, fingerprint_of
from kv_retract.erasers import KVEraserEraser, MaskEraser, NoneEraser, ShiftEraser
from kv_retract.erasers.kveraser import VARIANTS, KVEraserConfig
from kv_retract.erasers.kveraser.model import new_net
from kv_retract.errors import PoolExhaustedError
from kv_retract.kernels.rope import rotate_keys
from kv_retract.testing.erasers import SPANS, erase, keys_for, thread_ids
from kv_retract.testing.models import FAMILIES, tiny_model
from kv_retract.training.edits import EditRow, Query
from kv_retract.training.steering import collate_edits, student_logits
from kv_retract.types import SamplingParams

NEW = thread_ids(7, seed=3)
WEIGHTS = dict.fromkeys(("affected", "unaffected", "neighbor", "continuation"), 1.0)
PLACES = {**SPANS, "long": [(3, 70)], "all": [(0, 80)]}
"""The last two take several chunks of a forward pass."""

each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def learned(tmp_path):
    """An eraser of random weights for a tiny model; `spread` 0: a fresh one; `dtype`: what the model is rounded to."""

    @cache
    def learned(variant, family="qwen2", spread=0.05, dtype=torch.float32):
        model = tiny_model(family, dtype=dtype).float()
        config = KVEraserConfig(variant=variant, rank=4, hidden=32, fingerprint=fingerprint_of(model), base=family)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = new_net(model, config)
            for parameter in net.parameters():
                parameter.data += spread * torch.randn(parameter.shape)
        folder = tmp_path / f"{variant}-{family}-{spread}-{dtype}"
        net.save(folder)
        return model, net, KVEraserEraser(path=str(folder))

    return learned


def after(engine, key):
    """Logits of a new message behind an edited thread."""
    longer = ThreadKey(
        np.concatenate([key.ids, NEW]), np.concatenate([key.positions, key.next_position + np.arange(len(NEW))])
    )
    return engine.extend(longer, num_last=len(NEW)).logits


def row_of(ids, spans):
    return EditRow(ids, tuple(spans), (Query("unaffected", NEW, 1, len(ids)),))


@torch.no_grad()
def twin(model, net, ids, spans, **options):
    batch = collate_edits([row_of(ids, spans)], weights=WEIGHTS)
    return student_logits(model, net, batch, rotary=inspect_model(model)[1], **options)[0]


def report(name, found, wanted, tolerance=1e-4):
    difference = (found - wanted).abs()
    print(f"{name}: max {difference.max():.2e} mean {difference.mean():.2e}")
    assert float(difference.max()) <= tolerance


def far_from_unedited(logits, engine, ids):
    return float((logits - after(engine, build_key(ids, ()))).abs().max()) > 1e-2


@each_variant
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("where", PLACES)
def test_the_cached_path_equals_its_twins(learned, variant, page_size, where):
    (model, net, eraser), spans = learned(variant), PLACES[where]
    ids, engine = thread_ids(), HFEngine(model, max_tokens=1024, page_size=page_size, chunk_size=17)
    new, result = erase(engine, ids, spans, eraser)
    engine.check_integrity()
    found = after(engine, new)
    report("two phases", found, twin(model, net, ids, spans))
    if variant != "kv_map":
        report("one pass", found, twin(model, net, ids, spans, whole=True))
    assert far_from_unedited(found, engine, ids)
    size = sum(end - start for start, end in spans)
    assert (result.tokens_moved, result.tokens_recomputed) == ((size, 0) if variant == "kv_map" else (0, size))


def test_the_map_by_kernel_equals_the_map_by_reading_and_writing(learned, monkeypatch):
    model, _, eraser = learned("kv_map")
    ids, engines = thread_ids(), [HFEngine(model, max_tokens=1024) for _ in range(2)]
    states = []
    for engine in engines:
        new, _ = erase(engine, ids, SPANS["several"], eraser)
        states.append(engine.read_kv(new, 0, len(ids)))
        monkeypatch.setattr(HFEditView, "map_states", EditView.map_states)  # for the second one
    for found, wanted in zip(*states, strict=True):
        assert torch.equal(found, wanted)


@each_variant
@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_of_models(learned, variant, family):
    model, net, eraser = learned(variant, family)
    ids, spans, engine = thread_ids(), SPANS["several"], HFEngine(model, max_tokens=1024)
    new, _ = erase(engine, ids, spans, eraser)
    report("logits", after(engine, new), twin(model, net, ids, spans))


@pytest.mark.parametrize("variant", ["blind", "kv_map"])
@pytest.mark.parametrize("where", SPANS)
def test_a_fresh_eraser_encodes_the_span_plainly(learned, variant, where):
    """With adapters of zero the span reads what it read before: nothing changes, as under the control."""
    model, _, eraser = learned(variant, spread=0.0)
    ids, spans = thread_ids(), SPANS[where]
    engine, control = HFEngine(model, max_tokens=1024), HFEngine(model, max_tokens=1024)
    new, _ = erase(engine, ids, spans, eraser)
    same, _ = erase(control, ids, spans, NoneEraser())
    for found, wanted in zip(engine.read_kv(new, 0, 80), control.read_kv(same, 0, 80), strict=True):
        report("kv", found, wanted, 1e-5)


def test_a_fresh_suffix_aware_eraser_reads_what_follows(learned):
    """So it differs from the control even with adapters of zero, and only in layers that attend."""
    model, _, eraser = learned("suffix_aware", spread=0.0)
    engine, ids, spans = HFEngine(model, max_tokens=1024), thread_ids(), [(20, 27)]
    engine.extend(build_key(ids, ()))
    before = engine.read_kv(build_key(ids, ()), 20, 27)
    new, _ = erase(engine, ids, spans, eraser)
    found = engine.read_kv(new, 20, 27)
    torch.testing.assert_close(found[0][0], before[0][0], atol=1e-5, rtol=0)
    assert float((found[0][1] - before[0][1]).abs().max()) > 1e-2


@each_variant
def test_nothing_but_the_span_changes(learned, variant):
    model, _, eraser = learned(variant)
    engine, ids, spans = HFEngine(model, max_tokens=1024), thread_ids(), SPANS["several"]
    engine.extend(build_key(ids, ()))
    before = engine.read_kv(build_key(ids, ()), 0, 80)
    new, _ = erase(engine, ids, spans, eraser)
    outside = np.ones(80, bool)
    for start, end in spans:
        outside[start:end] = False
    for found, wanted in zip(engine.read_kv(new, 0, 80), before, strict=True):
        assert torch.equal(found[:, outside], wanted[:, outside])
        assert bool((found[:, ~outside] != wanted[:, ~outside]).any(dim=(0, 2, 3)).all()), "every token of the spans"


@each_variant
def test_only_the_suffix_aware_one_depends_on_what_follows(learned, variant):
    model, _, eraser = learned(variant)
    states = []
    for seed in (5, 6):
        engine, ids = HFEngine(model, max_tokens=1024), thread_ids()
        ids[40:] = thread_ids(40, seed=seed)
        new, _ = erase(engine, ids, [(20, 27)], eraser)
        states.append(engine.read_kv(new, 20, 27)[0])
    assert (float((states[0] - states[1]).abs().max()) < 1e-5) == (variant != "suffix_aware") == eraser.suffix_free


@each_variant
def test_threads_that_share_the_span_share_an_edit_that_does_not_depend_on_what_follows(learned, variant):
    model, net, eraser = learned(variant)
    engine, span = HFEngine(model, max_tokens=2048), (20, 27)
    threads = [np.concatenate([thread_ids(30), thread_ids(50, seed=seed)]) for seed in range(4, 8)]
    written = []
    for number, ids in enumerate(threads):
        edit = KeyEdit(
            start=20, end=27, exact=False, eraser_id=eraser.eraser_id, retraction_id=f"of thread {number}",
            shared=eraser.suffix_free,
        )  # fmt: skip
        old, new = build_key(ids, ()), build_key(ids, [edit])
        engine.extend(old)
        result = engine.erase(old, [span], eraser, new)
        engine.check_integrity()
        written.append(result.tokens_moved + result.tokens_recomputed)
        report(f"thread {number}", after(engine, new), twin(model, net, ids, [span]))
    assert written == ([7, 0, 0, 0] if eraser.suffix_free else [7, 7, 7, 7])
    assert engine.cached(build_key(threads[0], ())) <= 20, "the text is gone for all of them"


# -- edits of edited threads ----------------------------------------------------------------------------------------


@torch.no_grad()
def encoded_by_hand(model, net, ids, gone, span, moved):
    """Steering states of `span` in a thread from which `gone` went earlier, by plain transformers.

    Args:
        moved: how far what follows `gone` moved up.

    Returns:
        K and V. Shape of each: (num_layers, num_span, num_kv_heads, head_dim)
    """
    (start, end), rotary, positions = span, inspect_model(model)[1], np.arange(len(ids))
    positions[gone[1] :] -= moved
    at = torch.from_numpy(positions)
    cache = DynamicCache()
    model(torch.from_numpy(ids)[None], use_cache=True, **{cache_argument_of(model): cache})
    k, v = (
        torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers]) for name in ("keys", "values")
    )
    k = rotate_keys(k, torch.arange(len(ids)), at, rotary)
    if net.config.variant == "kv_map":
        return net.steer(k[:, start:end], v[:, start:end], at[start:end], rotary)
    read = np.delete(np.arange(len(ids)), np.r_[slice(*gone), slice(*span)])
    if net.config.variant == "blind":
        read = read[read < start]
    cache, length = DynamicCache(), end - start
    for layer in range(len(k)):
        cache.update(k[layer, read].transpose(0, 1)[None], v[layer, read].transpose(0, 1)[None], layer)
    seen = torch.cat([torch.ones(length, len(read)), torch.ones(length, length).tril()], dim=1).bool()
    with net.attached(model):
        model(
            torch.from_numpy(ids[start:end])[None], position_ids=at[None, start:end],
            attention_mask=additive_mask(seen, model.dtype)[None, None], use_cache=True,
            **{cache_argument_of(model): cache},
        )  # fmt: skip
    return tuple(
        torch.stack([getattr(layer, name)[0, :, -length:].transpose(0, 1) for layer in cache.layers])
        for name in ("keys", "values")
    )


@each_variant
@pytest.mark.parametrize("earlier", [MaskEraser(), ShiftEraser()], ids=lambda e: e.name)
def test_a_span_behind_an_earlier_edit(learned, variant, earlier):
    """Entries are no rows of the working set any more, and after a shift no positions either."""
    model, net, eraser = learned(variant)
    engine, ids = HFEngine(model, max_tokens=1024, chunk_size=4), thread_ids()
    new, _ = erase(engine, ids, [(5, 9)], earlier)
    edits = [
        KeyEdit(
            start=start, end=end, exact=False, eraser_id=e.eraser_id, retraction_id=f"r{start}",
            closes_gap=e.closes_gap, shared=e.suffix_free,
        )
        for start, end, e in ((5, 9, earlier), (20, 27, eraser))
    ]  # fmt: skip
    both = build_key(ids, edits)
    engine.erase(new, [(20, 27)], eraser, both)
    engine.check_integrity()
    wanted = encoded_by_hand(model, net, ids, (5, 9), (20, 27), moved=4 if earlier.closes_gap else 0)
    for name, found, states in zip("kv", engine.read_kv(both, 20, 27), wanted, strict=True):
        report(name, found, states)


@each_variant
def test_one_edit_after_another_and_both_at_once(learned, variant):
    """The same where nothing reads what follows; else the first edit has read the second span."""
    model, _, eraser = learned(variant)
    ids, spans = thread_ids(), [(5, 9), (30, 41)]
    one, two = HFEngine(model, max_tokens=1024), HFEngine(model, max_tokens=1024)
    both, _ = erase(one, ids, spans, eraser)
    first, _ = erase(two, ids, spans[:1], eraser)
    two.erase(first, spans[1:], eraser, both)
    k, wanted = two.read_kv(both, 0, 80)[0], one.read_kv(both, 0, 80)[0]
    assert (float((k - wanted).abs().max()) < 1e-5) == (variant != "suffix_aware")


@each_variant
def test_no_room_for_copies_leaves_cache_and_model_as_they_were(learned, variant):
    model, _, eraser = learned(variant)
    engine, ids = HFEngine(model, max_tokens=84), thread_ids()
    old, new = keys_for(ids, [(20, 27)], eraser)
    running = engine.generate(old, SamplingParams(max_tokens=3))
    next(running)
    before = engine.read_kv(old, 0, 80)
    with pytest.raises(PoolExhaustedError):
        engine.erase(old, [(20, 27)], eraser, new)
    assert all(torch.equal(a, b) for a, b in zip(engine.read_kv(old, 0, 80), before, strict=True))
    assert not any(module._forward_hooks for module in model.modules())
    running.close()
    engine.check_integrity()


@each_variant
def test_in_bfloat16(learned, variant):
    """An eraser of a checkpoint serves it in both types."""
    (exact, _, eraser), states = learned(variant, dtype=torch.bfloat16), []
    for each in (tiny_model(dtype=torch.bfloat16), exact):
        engine = HFEngine(each, max_tokens=512)
        new, _ = erase(engine, thread_ids(), SPANS["several"], eraser)
        states.append(engine.read_kv(new, 0, 80))
        engine.check_integrity()
    for found, wanted in zip(*states, strict=True):
        assert found.dtype == torch.bfloat16
        difference = (found.float() - wanted)[:, 30:41]
        print(f"{variant}: relative {float(difference.norm() / wanted[:, 30:41].norm()):.2e}")
        assert float(difference.norm()) < 0.05 * float(wanted[:, 30:41].norm())
