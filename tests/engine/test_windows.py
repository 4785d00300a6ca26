"""Passes over windows against plain prefills."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kv_retract.cache.base import NO_SLOT
from kv_retract.cache.bilayer import BiLayerPool, WindowShape
from kv_retract.engine.support import inspect_model
from kv_retract.engine.windows import States, encode_window
from kv_retract.engine.working import cache_argument_of
from kv_retract.landmarks import PooledLandmarks
from kv_retract.landmarks.net import LandmarkNet
from kv_retract.testing.erasers import thread_ids
from kv_retract.testing.models import FAMILIES, tiny_model

IDS = torch.from_numpy(thread_ids(24))
FIRST, SECOND = IDS[:12], IDS[12:]
SIZES = torch.tensor([4, 4, 4])
START = 37

each_family = pytest.mark.parametrize("family", FAMILIES)
trained_too = pytest.mark.parametrize("make", [lambda model: PooledLandmarks(), LandmarkNet.for_model])


def nothing(model):
    """No past."""
    spec, _ = inspect_model(model)
    return States(*torch.zeros(2, spec.num_layers, 0, spec.num_kv_heads, spec.head_dim, dtype=model.dtype))


def encode(model, landmarks, past, ids, start, *, sizes=SIZES, **options):
    return encode_window(model, inspect_model(model)[1], landmarks, past, ids, sizes, start, **options)


def prefill(model, ids, start):
    """A plain one: states, keys rotated, and logits."""
    cache = DynamicCache()
    positions = torch.arange(start, start + len(ids))
    output = model(ids[None], position_ids=positions[None], use_cache=True, **{cache_argument_of(model): cache})
    k, v = (torch.stack([getattr(layer, x)[0].transpose(0, 1) for layer in cache.layers]) for x in ("keys", "values"))
    return States(k, v), output.logits[0]


def placed(model, states, start):
    """States without rotation, rotated for positions behind each other."""
    return states.placed(start + np.arange(len(states)), inspect_model(model)[1])


def assert_close(found, wanted, tolerance=5e-5):
    for name, a, b in (("k", found.k, wanted.k), ("v", found.v, wanted.v)):
        assert a.shape == b.shape
        print(f"{name}: max {(a - b).abs().max():.2e} mean {(a - b).abs().mean():.2e} of {b.abs().mean():.2f}")
        assert float((a - b).abs().max()) <= tolerance


@each_family
@torch.no_grad()
def test_a_window_without_past_is_a_plain_prefill(family):
    model = tiny_model(family)
    found = encode(model, PooledLandmarks(), nothing(model), FIRST, START)
    states, logits = prefill(model, FIRST, START)
    assert_close(placed(model, found.tokens, START), states)
    torch.testing.assert_close(found.logits, logits[-1:], atol=1e-4, rtol=0)


@each_family
@torch.no_grad()
def test_keys_are_kept_without_rotation(family):
    """As the first layer has them where every token is at position 0."""
    model = tiny_model(family)
    found = encode(model, PooledLandmarks(), nothing(model), FIRST, START)
    cache = DynamicCache()
    model(FIRST[None], position_ids=torch.zeros(1, 12, dtype=torch.long), **{cache_argument_of(model): cache})
    torch.testing.assert_close(found.tokens.k[0], cache.layers[0].keys[0].transpose(0, 1), atol=1e-5, rtol=0)


@each_family
@torch.no_grad()
def test_a_window_behind_another_is_a_plain_prefill_of_both(family):
    model = tiny_model(family)
    first = encode(model, PooledLandmarks(), nothing(model), FIRST, START).tokens
    start = START + len(FIRST)
    found = encode(model, PooledLandmarks(), placed(model, first, START), SECOND, start, num_logits=12)
    states, logits = prefill(model, IDS, START)
    assert_close(placed(model, found.tokens, start), states.part(slice(12, None)))
    torch.testing.assert_close(found.logits, logits[12:], atol=1e-4, rtol=0)
    alone = encode(model, PooledLandmarks(), nothing(model), SECOND, start, num_logits=12)
    assert float((alone.logits - logits[12:]).abs().max()) > 1e-2, "the past is read"


@trained_too
@pytest.mark.parametrize("num_logits", [1, 5, 12])
@torch.no_grad()
def test_logits_are_of_the_last_tokens_and_of_no_landmark(make, num_logits):
    model = tiny_model()
    found = encode(model, make(model), nothing(model), FIRST, START, num_logits=num_logits).logits
    wanted = prefill(model, FIRST, START)[1][-num_logits:]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@trained_too
@torch.no_grad()
def test_hidden_blocks_have_no_landmarks(make):
    """A window from which tokens are hidden is encoded without them, and its landmarks fit the rows of L1."""
    model = tiny_model()
    spec, _ = inspect_model(model)
    pool = BiLayerPool(
        num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, num_windows=2,
        shape=WindowShape(window=12, ratio=4),
    )  # fmt: skip
    slots = pool.slots_of(np.array([1]))
    slots[3:9] = NO_SLOT  # of the first block one token, the second, of the third one
    visible = torch.from_numpy(slots != NO_SLOT)
    found = encode(model, make(model), nothing(model), FIRST[visible], START, sizes=torch.tensor([3, 3]))
    rows = pool.landmark_rows(slots)
    assert rows.tolist() == [3, 5]
    pool.write_landmarks(rows, found.landmarks.k, found.landmarks.v)
    assert torch.equal(pool.read_landmarks(rows)[0], found.landmarks.k)
    assert not pool.landmark_k[:, [0, 1, 2, 4]].any()
    assert_close(placed(model, found.tokens, START), prefill(model, FIRST[visible], START)[0])


def test_gradients_go_from_landmarks_to_what_they_are_made_of():
    model = tiny_model().requires_grad_(False)
    net = LandmarkNet.for_model(model)
    for part in ("k", "v"):
        landmarks = encode(model, net, nothing(model), FIRST, START).landmarks
        for layer in range(3):
            landmark = getattr(landmarks, part)[layer, 2]
            (grad,) = torch.autograd.grad(landmark.sum(), net.embedding, retain_graph=True)
            assert grad.abs().max() > 1e-3


def test_gradients_go_from_a_window_to_the_landmarks_that_it_reads():
    """As in training: what a later window predicts teaches the landmarks of an earlier one."""
    model = tiny_model().requires_grad_(False)
    net = LandmarkNet.for_model(model)
    landmarks = encode(model, net, nothing(model), FIRST, START).landmarks
    logits = encode(model, PooledLandmarks(), placed(model, landmarks, START - 3), SECOND, START).logits
    (grad,) = torch.autograd.grad(logits.square().sum(), net.embedding)
    assert grad.abs().max() > 1e-3
