"""The model over a working set: who sees whom, and the fingerprint of its weights."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kv_retract.cache.pool import PagedKVPool
from kv_retract.engine.support import inspect_model
from kv_retract.engine.working import (
    Buffers,
    ModelRunner,
    WorkingSet,
    additive_mask,
    cache_argument_of,
    causal_mask,
    fingerprint_of,
)
from kv_retract.testing.models import FAMILIES, tiny_model

IDS = np.random.default_rng(0).integers(3, 211, 30)
AT = np.arange(30)


def prefilled(model, n):
    """A runner, and a working set of the first `n` tokens."""
    spec, _ = inspect_model(model)
    pool = PagedKVPool(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, num_pages=1,
        dtype=model.dtype, device="cpu",
    )  # fmt: skip
    runner, working = ModelRunner(model), WorkingSet(pool, np.empty(0, np.int64))
    runner.forward(working, IDS[:n], AT[:n], AT[:n])
    return runner, working


def close(found, wanted):
    difference = (found - wanted).abs()
    print(f"max {difference.max():.2e} mean {difference.mean():.2e}")
    assert float(difference.max()) <= 1e-4


# -- visibility -----------------------------------------------------------------------------------------------------


def test_what_is_visible_by_default_is_what_stands_before():
    model = tiny_model()
    (runner, plain), (_, told) = prefilled(model, 20), prefilled(model, 20)
    rows = AT[20:]
    causal = torch.from_numpy(AT[None] <= rows[:, None])
    found = runner.forward(told, IDS[20:], rows, rows, visible=causal, num_logits=10)
    assert torch.equal(found, runner.forward(plain, IDS[20:], rows, rows, num_logits=10))
    assert torch.equal(found, runner.forward(plain, IDS[20:], rows, rows, num_logits=10)), "and again, in place"
    assert plain.length == told.length == 30
    assert torch.equal(plain.k[:, :30], told.k[:, :30]) and torch.equal(plain.v[:, :30], told.v[:, :30])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_see_what_they_are_told_to(family):
    """Against transformers with a mask of its own form: three tokens in the middle, run again with a random view."""
    model, rows = tiny_model(family), np.array([7, 8, 15])
    runner, working = prefilled(model, 20)
    before = working.k[:, :20].clone(), working.v[:, :20].clone()
    visible = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[:, rows] = torch.eye(3, dtype=torch.bool)
    logits = runner.forward(working, IDS[rows], AT[rows], rows, visible=visible, num_logits=3)
    others = np.setdiff1d(AT[:20], rows)
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(*before, strict=True)):
        cache.update(k[others].transpose(0, 1)[None], v[others].transpose(0, 1)[None], layer)
    seen = torch.cat([visible[:, others], visible[:, rows]], dim=1)
    output = model(
        torch.from_numpy(IDS[rows])[None], position_ids=torch.from_numpy(rows)[None],
        attention_mask=torch.where(seen, 0.0, -torch.inf)[None, None], use_cache=True,
        **{cache_argument_of(model): cache},
    )  # fmt: skip
    close(logits, output.logits[0])
    for layer, cached in enumerate(cache.layers):
        close(working.k[layer, rows], cached.keys[0, :, -3:].transpose(0, 1))
        close(working.v[layer, rows], cached.values[0, :, -3:].transpose(0, 1))
    for now, then in zip((working.k, working.v), before, strict=True):
        assert torch.equal(now[:, others], then[:, others]), "nothing else is written"


def test_a_pass_that_stops_writes_no_later_layer():
    runner, working = prefilled(tiny_model(), 20)
    before = working.k.clone()
    visible = torch.ones(1, 20, dtype=torch.bool)
    assert runner.forward(working, IDS[[5]], AT[[9]], AT[[5]], visible=visible, stop_layer=1) is None
    changed = (working.k != before)[:, :20].flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[0, 5], [1, 5]] and working.length == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_nothing_where_seen_and_the_lowest_number_elsewhere(dtype):
    seen = torch.tensor([[True, False], [False, True]])
    mask = additive_mask(seen, dtype)
    assert mask.dtype == dtype and torch.equal(mask == 0, seen)
    assert bool((mask[~seen] == torch.finfo(dtype).min).all()) and bool(torch.isfinite(mask).all())


# -- fingerprints ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_same_in_float32_and_bfloat16():
    """Of one checkpoint: of bfloat16 read as float32, and of float32 rounded to bfloat16."""
    low = tiny_model(dtype=torch.bfloat16)
    assert fingerprint_of(low) == fingerprint_of(low.float()) == fingerprint_of(tiny_model())
    assert fingerprint_of(tiny_model()) == ModelRunner(tiny_model()).fingerprint


def test_a_fingerprint_tells_other_weights():
    changed, permuted, reshaped = tiny_model(), tiny_model(), tiny_model()
    changed.model.layers[2].mlp.up_proj.weight.data[-20:] += 0.5
    embeddings = permuted.get_input_embeddings().weight.data
    embeddings.copy_(embeddings[torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0))])
    norm = reshaped.model.norm.weight
    norm.data = norm.data[None]
    others = map(tiny_model, ("llama", "qwen3", "phi3"))  # a tiny mistral has the weights of the tiny llama
    models = [tiny_model(), changed, permuted, reshaped, tiny_model(seed=1), *others]
    prints = [fingerprint_of(model) for model in models]
    assert len(set(prints)) == len(prints)


def test_the_mask_of_the_last_tokens_is_that_of_all_rows_before_them():
    rows = torch.arange(7, 12)
    seen = torch.arange(12)[None] <= rows[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(causal_mask(5, 12, dtype, torch.device("cpu")), additive_mask(seen, dtype))


# -- memory ---------------------------------------------------------------------------------------------------------


def small_pool(num_pages=40):
    pool = PagedKVPool(num_layers=2, num_kv_heads=1, head_dim=4, num_pages=num_pages)
    pool.write(np.arange(num_pages), *(torch.randn(2, num_pages, 1, 4) for _ in range(2)))
    return pool


def test_memory_that_is_given_back_is_used_again_and_holds_the_new_rows():
    pool, buffers = small_pool(), Buffers()
    with WorkingSet(pool, np.arange(30), buffers=buffers) as first:
        where = first.k.data_ptr()
    with WorkingSet(pool, np.arange(10, 30), capacity=25, buffers=buffers) as second:
        assert second.k.data_ptr() == where
        assert torch.equal(second.k[:, :20], pool.k[:, 10:30])
        with WorkingSet(pool, np.arange(5), buffers=buffers) as beside:
            assert beside.k.data_ptr() != where, "two at once have memory of their own"


def test_what_is_too_small_is_not_used_and_the_largest_are_kept():
    pool, buffers = small_pool(), Buffers(keep=1)
    for rows in (5, 30, 8):
        WorkingSet(pool, np.arange(rows), buffers=buffers).close()
    k, _ = buffers.take(pool, 30)
    assert k.shape[1] >= 30
    assert buffers.take(pool, 1)[0].shape[1] < 5, "nothing else was kept"


def test_a_working_set_that_is_closed_twice_gives_its_memory_once():
    pool, buffers = small_pool(), Buffers()
    working = WorkingSet(pool, np.arange(5), buffers=buffers)
    working.close()
    working.close()
    assert buffers.take(pool, 5)[0].data_ptr() != buffers.take(pool, 5)[0].data_ptr()


def test_memory_that_was_in_use_when_all_was_forgotten_does_not_come_back():
    pool, buffers = small_pool(), Buffers()
    with WorkingSet(pool, np.arange(30), buffers=buffers):
        buffers.forget()
    assert not buffers._kept


def test_memory_from_inference_mode_serves_outside_of_it():
    pool, buffers = small_pool(), Buffers()
    with torch.inference_mode(), WorkingSet(pool, np.arange(5), buffers=buffers) as working:
        working.reserve(30)
    with WorkingSet(pool, np.arange(30), buffers=buffers) as again:
        assert torch.equal(again.k[:, :30], pool.k[:, :30])


def test_forgotten_memory_is_gone():
    pool, buffers = small_pool(), Buffers()
    WorkingSet(pool, np.arange(30), buffers=buffers).close()
    buffers.forget()
    assert buffers.take(pool, 1)[0].shape[1] < 30
