"""The head start: what the wired heads attend to before any training, and that it is enough to copy."""

import pytest
import torch

from kv_retract.training import reference

CHANCE = 1 / 2048
SHAPES = {
    "bundled": dict(num_heads=6),
    "narrow heads": dict(hidden_size=128, num_layers=3, num_heads=6, head_dim=32),
}


def twice(n, vocab_size, seed=1):
    """`n` different random tokens, and the same again."""
    once = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.cat([once, once])[None]


@torch.inference_mode()
def look(model, ids):
    """The logits, and the attention of query head 0 of the first two layers."""
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True)
    return out.logits[0], out.attentions[0][0, 0], out.attentions[1][0, 0]


@pytest.fixture(scope="module", params=SHAPES)
def model(request, model_of):
    return model_of(reference.ReferenceConfig(**SHAPES[request.param])), request.param


@pytest.mark.parametrize("n", [64, 300])
def test_head_0_of_layer_0_attends_to_the_token_before(model, n):
    _, first, _ = look(model[0], twice(n, model[0].config.vocab_size))
    before = first.diagonal(-1)
    assert before.min() > 0.99 and first[0, 0] == 1


@pytest.mark.parametrize("n", [64, 300])
def test_head_0_of_layer_1_attends_to_the_token_behind_the_earlier_occurrence(model, n):
    model, name = model
    _, _, second = look(model, twice(n, model.config.vocab_size))
    queries = torch.arange(n, 2 * n - 1)
    found = second[queries, queries - n + 1]
    assert found.mean() > (0.7 if name == "narrow heads" else 0.95)
    assert (second[queries].argmax(1) == queries - n + 1).float().mean() > 0.95


def test_an_untrained_model_copies(model):
    model, name = model
    n = 300
    ids = twice(n, model.config.vocab_size)
    logits = look(model, ids)[0]
    right = (logits[n:-1].argmax(-1) == ids[0, n + 1 :]).float().mean()
    assert right > 0.3 > 100 * CHANCE
    assert (logits[: n - 1].argmax(-1) == ids[0, 1:n]).float().mean() < 0.02, "nothing to copy from, the first time"


def test_without_the_wiring_there_is_no_copying(model_of, monkeypatch):
    monkeypatch.setattr(reference, "wire_induction", lambda model, generator: None)
    plain = model_of(reference.ReferenceConfig(num_heads=6))
    n = 300
    ids = twice(n, plain.config.vocab_size)
    logits, first, second = look(plain, ids)
    queries = torch.arange(n, 2 * n - 1)
    assert first.diagonal(-1).mean() < 0.1 and second[queries, queries - n + 1].mean() < 0.1
    assert (logits[n:-1].argmax(-1) == ids[0, n + 1 :]).float().mean() < 0.02


def test_names_that_no_model_has_seen_are_copied_from_a_thread(model_of, make, encoder):
    """The token behind the first token of a name: in the thread it stands once or more, always followed the same."""
    model = model_of(reference.ReferenceConfig(num_heads=6))
    right = total = 0
    for seed in range(10):
        sample = make("needles", seed, length=128, split="test")
        row = encoder.encode(sample, sample.probes[:1], with_tools=False)
        with torch.inference_mode():
            likely = model(torch.from_numpy(row.ids)[None]).logits[0].argmax(-1)
        thread = row.ids[row.probe == -1].tolist()
        for i in range(len(thread), len(row.ids) - 1):
            behind = {b for a, b in zip(thread, thread[1:], strict=False) if a == row.ids[i]}
            if behind == {row.ids[i + 1]}:
                right, total = right + int(likely[i] == row.ids[i + 1]), total + 1
    assert total > 50 and right / total > 0.6


@torch.inference_mode()
def test_a_value_that_is_hidden_is_read_from_a_later_mention(model_of):
    """`k i s V ... k m x ... k i s`, and V is hidden from the end: x matched V in layer 1, and the end matches x."""
    ranks, found = {True: [], False: []}, []
    for seed in range(8):
        model = model_of(reference.ReferenceConfig(seed=seed))
        model.set_attn_implementation("eager")
        ids = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))[:100]
        told, mention, end = 20, 60, 99
        ids[mention - 1] = ids[end - 2] = ids[told - 2]
        ids[[end - 1, end]] = ids[[told - 1, told]]
        value = ids[told + 1]
        mask = torch.full((100, 100), torch.finfo(torch.float32).min).triu(1)
        mask[-3:, told - 2 : told + 2] = torch.finfo(torch.float32).min
        for wired in (True, False):
            if not wired:
                model.model.layers[2].self_attn.o_proj.weight.zero_()
            out = model(ids[None], attention_mask=mask[None, None], output_attentions=True)
            ranks[wired].append(int((out.logits[0, -1] > out.logits[0, -1, value]).sum()))
            if wired:
                found.append(float(out.attentions[2][0, 0, -1, mention + 1]))
    assert sum(found) / len(found) > 0.2, "a hundredth by chance; the end itself matches as well"
    assert sum(ranks[True]) < 0.8 * sum(ranks[False])


def test_the_same_seed_draws_the_same_model(model_of):
    one, again, other = (model_of(reference.ReferenceConfig(num_heads=6, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_drawing_leaves_the_global_chance_alone(model_of, tiny):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    model_of(tiny())
    assert torch.equal(torch.rand(3), want)


def test_all_weights_are_finite_and_trainable(model_of):
    model = model_of(reference.ReferenceConfig(num_heads=6))
    assert all(p.isfinite().all() and p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 16e6
    ids = twice(20, model.config.vocab_size)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
