"""The learned eraser apart from the cache: its networks, its files, and what it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch

from kv_retract.engine.working import fingerprint_of
from kv_retract.erasers import ERASERS, EditShape, KVEraserEraser
from kv_retract.erasers.kveraser import VARIANTS, KVEraserConfig
from kv_retract.erasers.kveraser.config import CONFIG, WEIGHTS
from kv_retract.erasers.kveraser.model import load_net, new_net
from kv_retract.errors import EraserMismatchError
from kv_retract.testing.erasers import erase, keys_for, thread_ids
from kv_retract.testing.models import tiny_model

each_variant = pytest.mark.parametrize("variant", VARIANTS)
IDS = torch.from_numpy(thread_ids(20))[None]


def net_of(model, variant, *, spread=0.05, seed=0):
    config = KVEraserConfig(variant=variant, rank=4, hidden=16, fingerprint=fingerprint_of(model), base="tiny")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = new_net(model, config)
        for parameter in net.parameters():
            parameter.data += spread * torch.randn(parameter.shape)
    return net


@pytest.fixture
def saved(tmp_path):
    def saved(variant, **options):
        folder = tmp_path / f"{variant}{len(list(tmp_path.iterdir()))}"
        net_of(tiny_model(), variant, **options).save(folder)
        return folder

    return saved


# -- adapters -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adapters_act_where_they_are_gated_and_only_while_attached():
    model = tiny_model()
    net, plain = net_of(model, "blind"), tiny_model()(IDS).logits
    gate = torch.zeros(IDS.shape, dtype=torch.bool)
    with net.attached(model, gate):
        assert torch.equal(model(IDS).logits, plain), "no token is a span's"
    gate[:, 12:15] = True
    with net.attached(model, gate):
        changed = model(IDS).logits
    assert torch.equal(changed[:, :12], plain[:, :12]) and float((changed[:, 12:] - plain[:, 12:]).abs().min()) > 0
    with net.attached(model):
        assert float((model(IDS).logits - plain).abs().amax(-1).min()) > 1e-3, "all tokens"
    assert torch.equal(model(IDS).logits, plain)


@torch.no_grad()
def test_adapters_do_not_act_in_other_threads():
    model = tiny_model()
    net, plain = net_of(model, "blind"), model(IDS).logits
    with net.attached(model), ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.no_grad()(lambda: model(IDS).logits)).result()
    assert torch.equal(found, plain)


@torch.no_grad()
def test_hooks_are_gone_and_weights_as_before_after_an_exception():
    model, weights = tiny_model(), deepcopy(tiny_model().state_dict())
    net, plain = net_of(model, "suffix_aware"), model(IDS).logits
    with pytest.raises(KeyboardInterrupt), net.attached(model):
        model(IDS)
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(IDS).logits, plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_an_adapter_is_a_product_of_two_small_matrices():
    """Against LoRA written out: y + scale * B A x, and the offset on the embeddings."""
    model, net = tiny_model(), net_of(tiny_model(), "blind")
    merged = tiny_model()
    for name, module in merged.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not merged.get_output_embeddings():
            key = name.replace(".", "/")
            module.weight += net.config.scale * net.b[key] @ net.a[key]
    inputs = merged.get_input_embeddings()(IDS) + net.offset
    with net.attached(model):
        torch.testing.assert_close(model(IDS).logits, merged(inputs_embeds=inputs).logits, atol=1e-4, rtol=0)


def test_adapters_are_on_every_linear_layer_but_the_last():
    model = tiny_model()
    net = net_of(model, "blind")
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert {key.replace("/", ".") for key in net.a} == set(linear) - {"lm_head"} and len(net.a) == 3 * 7


# -- map ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_map_is_one_small_network_per_layer_and_head():
    net = net_of(tiny_model(), "kv_map", spread=0.3)
    k, v = torch.randn(3, 5, 2, 12), 4 * torch.randn(3, 5, 2, 12)
    found = net(k, v)
    for layer in range(3):
        for head in range(2):
            i = 2 * layer + head
            for token in range(5):
                a, b = k[layer, token, head], v[layer, token, head]
                sizes = [x.square().mean().sqrt() for x in (a, b)]
                x = torch.cat([a / sizes[0], b / sizes[1]])
                dk, dv = (torch.nn.functional.gelu(x @ net.w1[i] + net.b1[i, 0]) @ net.w2[i] + net.b2[i, 0]).split(12)
                torch.testing.assert_close(found[0][layer, token, head], a + sizes[0] * dk, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(found[1][layer, token, head], b + sizes[1] * dv, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_fresh_map_returns_what_it_is_given():
    net = net_of(tiny_model(), "kv_map", spread=0.0)
    k, v = torch.randn(3, 5, 2, 12, dtype=torch.bfloat16), torch.randn(3, 5, 2, 12, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(net(k, v), (k, v), strict=True))


# -- files ----------------------------------------------------------------------------------------------------------


@each_variant
def test_saving_and_loading_changes_nothing(saved, variant):
    folder = saved(variant)
    net = load_net(folder)
    wanted = net_of(tiny_model(), variant)
    assert net.config == wanted.config and not any(p.requires_grad for p in net.parameters())
    assert net.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}


@each_variant
def test_its_id_tells_the_weights_and_not_the_place(saved, variant):
    first, same, other = (KVEraserEraser(path=str(saved(variant, seed=seed))) for seed in (0, 0, 1))
    assert first.eraser_id == same.eraser_id != other.eraser_id
    assert first.eraser_id.startswith(f"kveraser(variant='{variant}',weights='")
    assert first.variant == variant, "the folder says it, whatever the default is"
    cost = first.cost(EditShape(prefix=10, span=5, suffix=100))
    assert (cost.recomputed, cost.moved) == ((0, 5) if variant == "kv_map" else (5, 0))


@each_variant
def test_another_model_is_refused_and_keeps_its_cache(saved, variant, engine_of):
    engine, ids = engine_of(tiny_model(seed=1)), thread_ids()
    with pytest.raises(EraserMismatchError, match="trained on model 'tiny'.*kv-retract train eraser --model DIR"):
        erase(engine, ids, [(20, 27)], KVEraserEraser(path=str(saved(variant))))
    engine.check_integrity()
    assert engine.tokens_in_use() == 80


@pytest.fixture
def engine_of():
    from kv_retract.engine.hf import HFEngine

    return lambda model: HFEngine(model, max_tokens=512)


def test_what_is_no_eraser(saved, tmp_path):
    with pytest.raises(EraserMismatchError, match=f"expected a learned eraser in .*{tmp_path.name}.*train eraser"):
        KVEraserEraser(path=str(tmp_path / "none"))
    for content in ("", "[]", '{"variant": "other"}', '{"colour": 1}', '{"rank": 0}'):
        folder = saved("blind")
        (folder / CONFIG).write_text(content)
        with pytest.raises(EraserMismatchError, match="expected a learned eraser"):
            KVEraserEraser(path=str(folder))
    with pytest.raises(ValueError, match="expected a variant of blind, suffix_aware, kv_map, got 'best'"):
        ERASERS.create("kveraser", variant="best")


@pytest.mark.parametrize("damage", ["cut", "missing", "of another variant"])
def test_damaged_weights(saved, damage):
    folder = saved("blind")
    weights = folder / WEIGHTS
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "missing":
        weights.unlink()
    else:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "variant": "kv_map"}))
    with pytest.raises(EraserMismatchError, match=f"cannot read the weights in .*{WEIGHTS}"):
        load_net(folder)
    if damage == "missing":
        with pytest.raises(EraserMismatchError, match="cannot read the weights"):
            _ = KVEraserEraser(path=str(folder)).eraser_id


@each_variant
def test_damaged_weights_leave_the_cache_as_it_was(saved, variant, engine_of):
    folder, engine = saved(variant), engine_of(tiny_model())
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    eraser = KVEraserEraser(path=str(folder))
    old, new = keys_for(thread_ids(), [(20, 27)], eraser)
    engine.extend(old)
    before = engine.read_kv(old, 0, 80)
    with pytest.raises(EraserMismatchError, match="cannot read the weights"):
        engine.erase(old, [(20, 27)], eraser, new)
    assert all(torch.equal(a, b) for a, b in zip(engine.read_kv(old, 0, 80), before, strict=True))
    assert engine.cached(new) == 20
    engine.check_integrity()


@each_variant
def test_a_folder_may_move(saved, variant, engine_of, tmp_path):
    """Its id stays, and what it writes, bit by bit."""
    folder, states, ids = saved(variant), [], set()
    for place in (folder, tmp_path / "elsewhere" / "renamed"):
        if place != folder:
            place.parent.mkdir()
            folder.rename(place)
        engine, eraser = engine_of(tiny_model()), KVEraserEraser(path=str(place))
        new, _ = erase(engine, thread_ids(), [(20, 27), (40, 60)], eraser)
        states.append(engine.read_kv(new, 0, 80))
        ids.add(eraser.eraser_id)
    assert len(ids) == 1 and all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@each_variant
def test_no_edit_touches_the_base_model(saved, variant, engine_of):
    model, weights = tiny_model(), deepcopy(tiny_model().state_dict())
    erase(engine_of(model), thread_ids(), [(20, 27)], KVEraserEraser(path=str(saved(variant))))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
