"""What stands for blocks: means against loops, and trained landmarks against a model that has their weights."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kv_retract.cache.refill import Look
from kv_retract.engine.support import inspect_model
from kv_retract.engine.windows import States, encode_window
from kv_retract.engine.working import cache_argument_of
from kv_retract.errors import LandmarkMismatchError, UnsupportedModelError
from kv_retract.kernels.rope import rotate_keys
from kv_retract.landmarks import PooledLandmarks
from kv_retract.landmarks.config import WEIGHTS
from kv_retract.landmarks.net import LandmarkNet
from kv_retract.testing.erasers import thread_ids
from kv_retract.testing.models import FAMILIES, tiny_model

IDS = torch.from_numpy(thread_ids(20))
BEFORE, WINDOW = IDS[:6], IDS[6:]
SIZES = torch.tensor([5, 1, 8])
TRAINABLE = [family for family in FAMILIES if family != "phi3"]

each_family = pytest.mark.parametrize("family", TRAINABLE)


def moved(module, names, spread):
    """A module some of whose parameters are moved at random."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in module.named_parameters():
            if names in name:
                parameter.data += spread * torch.randn(parameter.shape)
    return module


def frozen(family="qwen2"):
    """A model whose biases, where it has some, are not zero."""
    return moved(tiny_model(family), "bias", 0.3).requires_grad_(False)


def net_of(model, *, spread=0.0):
    """A fresh net; with a spread, one that training has moved."""
    return moved(LandmarkNet.for_model(model), "", spread)


def run(model, cache=None, **inputs):
    """A plain pass; returns what the cache holds after it, keys rotated, and the logits."""
    cache = DynamicCache() if cache is None else cache
    output = model(**{cache_argument_of(model): cache}, use_cache=True, **inputs)
    k, v = (torch.stack([getattr(layer, x)[0].transpose(0, 1) for layer in cache.layers]) for x in ("keys", "values"))
    return States(k, v), output.logits[0]


def encode(model, landmarks):
    """The window, behind tokens that are read in full."""
    past, _ = run(model, input_ids=BEFORE[None])
    return encode_window(
        model, inspect_model(model)[1], landmarks, past, WINDOW, SIZES, len(BEFORE), num_logits=len(WINDOW)
    )


def assert_close(found, wanted, tolerance=2e-5):
    for name in ("k", "v"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.shape == b.shape
        print(f"{name}: max {(a - b).abs().max():.2e} mean {(a - b).abs().mean():.2e} of {b.abs().mean():.2f}")
        assert float((a - b).abs().max()) <= tolerance


# -- means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooled_landmarks_are_the_means_of_their_blocks(dtype):
    sizes, generator = [3, 1, 300], torch.Generator().manual_seed(0)
    k, v = (torch.randint(-200, 200, (2, sum(sizes), 2, 3), generator=generator).to(dtype) for _ in range(2))
    for x, means in zip((k, v), PooledLandmarks().states(k, v, torch.tensor(sizes)), strict=True):
        assert means.shape == (2, 3, 2, 3) and means.dtype == dtype
        start = 0
        for block, size in enumerate(sizes):
            wanted = sum(x[:, token].double() for token in range(start, start + size)) / size
            torch.testing.assert_close(means[:, block], wanted.to(dtype), atol=1e-6, rtol=1e-6)
            start += size


# -- a fresh net ----------------------------------------------------------------------------------------------------


@each_family
def test_a_fresh_net_has_copies_of_the_projections(family):
    model = frozen(family).bfloat16()
    weights, net = deepcopy(model.state_dict()), LandmarkNet.for_model(model)
    assert len(net.weight) == 3 * 3 - 1 and len(net.bias) == (8 if family == "qwen2" else 0)
    for kind, found in (("weight", net.weight), ("bias", net.bias)):
        for name, parameter in found.items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, weights[f"{name.replace('/', '.')}.{kind}"].float())
    torch.testing.assert_close(net.embedding, weights["model.embed_tokens.weight"].float().mean(0))
    for parameter in net.parameters():
        parameter.data.fill_(9)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@each_family
@torch.no_grad()
def test_a_fresh_landmark_is_one_more_token_with_the_mean_embedding(family):
    """The first of a window, at the position of its block's last token, behind that block."""
    model = frozen(family)
    found = encode(model, net_of(model)).landmarks
    size, embed = int(SIZES[0]), model.get_input_embeddings()
    inputs = torch.cat([embed(IDS[: len(BEFORE) + size]), embed.weight.mean(0)[None]])
    last = len(BEFORE) + size - 1
    positions = np.append(np.arange(len(inputs) - 1), last)
    plain, _ = run(model, inputs_embeds=inputs[None], position_ids=torch.from_numpy(positions)[None])
    first = found.part(slice(1)).placed(np.array([last]), inspect_model(model)[1])
    assert_close(first, plain.part(slice(-1, None)))


# -- a trained net --------------------------------------------------------------------------------------------------


def twin(model, net, *, earlier=True):
    """Landmarks of the window one by one, through a copy of the model that has the net's projections for its own.

    Args:
        earlier: whether each reads those before it.
    """
    changed, rotary = deepcopy(model), inspect_model(model)[1]
    for name, weight in net.weight.items():
        projection = changed.get_submodule(name.replace("/", "."))
        projection.weight.data = weight.data
        if name in net.bias:
            projection.bias.data = net.bias[name].data
    plain, _ = run(model, input_ids=IDS[None])
    k, v, at = plain.k[:, :0], plain.v[:, :0], []
    for end in (len(BEFORE) + SIZES.cumsum(0)).tolist():
        cache, read = DynamicCache(), slice(0, len(at) if earlier else 0)
        for layer in range(len(k)):
            seen = (torch.cat([a[layer, :end], b[layer, read]]) for a, b in ((plain.k, k), (plain.v, v)))
            cache.update(*(x.transpose(0, 1)[None] for x in seen), layer)
        at.append(end - 1)
        states, _ = run(changed, cache, inputs_embeds=net.embedding[None, None], position_ids=torch.tensor([at[-1:]]))
        k, v = torch.cat([k, states.k[:, -1:]], 1), torch.cat([v, states.v[:, -1:]], 1)
    return States(rotate_keys(k, torch.tensor(at), torch.zeros(len(at)), rotary), v)


@each_family
@torch.no_grad()
def test_landmarks_read_their_block_what_is_before_it_and_each_other(family):
    model = frozen(family)
    net = net_of(model, spread=0.1)
    found = encode(model, net).landmarks
    assert_close(found, twin(model, net))
    alone = twin(model, net, earlier=False)
    assert_close(found.part(slice(1)), alone.part(slice(1)))
    assert float((found.v - alone.v)[1:, 1:].abs().amax((0, 2, 3)).min()) > 1e-3, "earlier landmarks are read"


@each_family
@torch.no_grad()
def test_the_tokens_of_a_window_do_not_read_its_landmarks(family):
    model = frozen(family)
    plain, found = encode(model, PooledLandmarks()), encode(model, net_of(model, spread=0.1))
    assert_close(found.tokens, plain.tokens)
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_in_bfloat16():
    model = frozen().bfloat16()
    net = net_of(model, spread=0.1)
    rounded, wanted = encode(model, net).landmarks, encode(model.float(), net).landmarks
    for found, other in ((rounded.k, wanted.k), (rounded.v, wanted.v)):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - other).norm()) < 0.05 * float(other.norm())


def test_gradients_reach_the_net_and_nothing_of_the_model():
    """But for the queries of the last layer: what landmarks attend to there, nothing reads."""
    model = frozen()
    net = net_of(model, spread=0.1)
    found = encode(model, net).landmarks
    scores = net.pooling.all_scores(look_of(model, layer) for layer in range(3))
    (found.k.square().sum() + found.v.square().sum() + (scores * torch.rand(5)).sum()).backward()
    without = {name for name, x in net.named_parameters() if x.grad is None or not x.grad.any()}
    assert without <= {f"{kind}.model/layers/2/self_attn/q_proj" for kind in ("weight", "bias")}
    assert all(parameter.grad is None for parameter in model.parameters())


# -- pooling, identity and files ------------------------------------------------------------------------------------


def look_of(model, seed):
    """Two tokens that look for five landmarks, at places that do not matter."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    head_dim = model.get_submodule("model.layers.0.self_attn").head_dim
    shapes = (config.num_attention_heads, 2), (5, config.num_key_value_heads), (3, config.num_key_value_heads)
    q, marks, others = (torch.randn(*shape, head_dim, generator=generator) for shape in shapes)
    return Look(q, marks, others, 0.3, 20, np.arange(5), inspect_model(model)[1])


@torch.no_grad()
def test_the_best_match_of_each_head_counts_by_its_weight():
    net, looks = net_of(tiny_model(), spread=0.3), [look_of(tiny_model(), layer) for layer in range(3)]
    wanted = torch.zeros(5)
    for layer, look in enumerate(looks):
        q, k = look.without_positions(), look.landmark_k
        for head in range(4):
            sought, centred = q[head] @ net.maps[layer, head], k[:, head // 2] - k[:, head // 2].mean(0)
            for mark in range(5):
                best = max(float(token @ centred[mark]) * 0.3 for token in sought)
                wanted[mark] += net.heads[layer, head] * best
    found = net.pooling.all_scores(looks)
    assert found.shape == (3, 5)
    for layer in found:
        torch.testing.assert_close(layer, wanted, atol=1e-5, rtol=1e-5)


def test_a_fresh_net_matches_as_the_model_does():
    pooling = net_of(tiny_model()).pooling
    assert torch.equal(pooling.maps, torch.eye(pooling.maps.shape[-1]).expand_as(pooling.maps))
    torch.testing.assert_close(pooling.weights, torch.full((3, 4), 1 / 4))


def test_a_net_is_named_by_every_one_of_its_weights():
    net = net_of(tiny_model(), spread=0.1)
    names = {net.identity, PooledLandmarks().identity}
    assert deepcopy(net).identity == net.identity and len(names) == 2
    for parameter in net.parameters():
        parameter.data.view(-1)[-1] += 1e-3
        names.add(net.identity)
    net.attended = False
    names.add(net.identity)
    assert len(names) == 3 + len(list(net.parameters()))


def test_a_saved_net_is_for_its_model_only(tmp_path):
    model = frozen()
    net = net_of(model, spread=0.1)
    net.attended = False
    net.save(tmp_path / "net", fingerprint="of this model", base="tiny")
    again = LandmarkNet.load(tmp_path / "net", model, "of this model")
    assert again.identity == net.identity and not again.attended
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(LandmarkMismatchError, match="trained on model 'tiny' .fingerprint of this model."):
        LandmarkNet.load(tmp_path / "net", model, "of another")
    with pytest.raises(LandmarkMismatchError, match="expected trained landmarks in"):
        LandmarkNet.load(tmp_path, model, "of this model")
    weights = tmp_path / "net" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(LandmarkMismatchError, match="cannot read the weights"):
        LandmarkNet.load(tmp_path / "net", model, "of this model")


# -- attached to a model --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_nothing_is_left_on_the_model():
    model = frozen()
    weights = deepcopy(model.state_dict())
    net, gate = net_of(model, spread=0.1), torch.ones(1, len(IDS), dtype=torch.bool)
    plain = model(IDS[None]).logits
    with net.attached(model, gate):
        assert float((model(IDS[None]).logits - plain).abs().amax(-1).min()) > 1e-2, "landmarks are other tokens"
    with pytest.raises(KeyboardInterrupt), net.attached(model, gate):
        model(IDS[None])
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(IDS[None]).logits, plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_other_threads_run_the_plain_model_meanwhile():
    model = frozen()
    net, plain = net_of(model, spread=0.1), model(IDS[None]).logits
    with net.attached(model, torch.ones(1, len(IDS), dtype=torch.bool)), ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.no_grad()(lambda: model(IDS[None]).logits)).result()
    assert torch.equal(found, plain)


def test_a_model_whose_projections_are_one_is_refused():
    model = tiny_model("phi3")
    with pytest.raises(UnsupportedModelError, match="found 0 such projections.*use pooled landmarks"):
        LandmarkNet.for_model(model)
    gate = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError), net_of(tiny_model()).attached(model, gate):
        pass
    assert not any(module._forward_hooks for module in model.modules())
