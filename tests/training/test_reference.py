"""The reference model's configuration, batches and loss; how it trains is in `test_reference_run.py`."""

import json
import random
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from kv_retract.errors import KVRetractError
from kv_retract.training.encoding import Row
from kv_retract.training.reference import (
    GROUP,
    ConfigError,
    ReferenceConfig,
    batches,
    collate,
    loss_of,
    probe_accuracy,
    read_config,
)

# -- configuration --------------------------------------------------------------------------------------------------


def test_no_file_means_the_defaults():
    assert read_config(None) == ReferenceConfig()


def test_a_configuration_survives_json(tmp_path):
    config = ReferenceConfig(hidden_size=64, lengths=((0.0, 96), (0.5, 200)), families=("facts", "errors"), seed=3)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert read_config(path) == config
    path.write_text(json.dumps({"steps": 7}))
    assert read_config(path) == ReferenceConfig(steps=7)


def test_all_families_are_not_named():
    assert "families" not in ReferenceConfig().to_json() and ReferenceConfig().to_json()["steps"] == 12_000
    assert ReferenceConfig(families=("facts",)).to_json()["families"] == ("facts",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"layers": 3}', "layers"),
        ('{"steps": "many"}', "expected steps to be a number of at least 0, got 'many'"),
        ('{"steps": 1.5}', "steps"),
        ('{"learning_rate": -1}', "learning_rate"),
        ('{"steps": 0}', "at least 1"),
        ('{"lengths": 5}', "not iterable"),
        ('{"lengths": [[0]]}', "expected a JSON object"),
        ('{"lengths": []}', "lengths that begin at 0"),
        ('{"lengths": [[0.5, 100]]}', "lengths that begin at 0"),
        ('{"num_layers": 1}', "at least 2 layers"),
        ('{"head_dim": 33}', "even head_dim"),
        ('{"head_dim": 256}', "even head_dim of 8 to hidden_size"),
        ('{"hidden_size": 32, "head_dim": 16}', "hidden_size of at least 48"),
        ('{"num_heads": 7}', "at least 2 KV heads .* got 2 and 7 heads"),
        ('{"num_heads": 4}', "multiple of at least 3"),
        ('{"num_kv_heads": 0}', "at least 2 KV heads"),
        ('{"families": ["nope"]}', "expected families of errors, facts, .* got nope"),
        ('{"families": ["documents"]}', "got documents"),
        ('{"families": "facts"}', "expected families of"),
        ('{"families": 5}', "not iterable"),
    ],
)
def test_what_is_no_configuration(tmp_path, content, told):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        read_config(path)
    assert isinstance(caught.value, KVRetractError) and "config.json" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError):
            read_config(path)


# -- batches --------------------------------------------------------------------------------------------------------


def same(a, b):
    fields = [(getattr(a, name), getattr(b, name)) for name in ("ids", "answer", "text", "visible")]
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in fields)


@pytest.fixture(scope="module")
def all_batches(tiny, encoder):
    config = tiny(steps=18, notes_from=0.0)
    return config, list(batches(config, encoder))


def test_one_batch_per_step(all_batches):
    config, made = all_batches
    assert len(made) == 18 and not any(same(a, b) for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 16, 17])
def test_a_batch_depends_on_its_step_only(all_batches, encoder, step):
    config, made = all_batches
    rest = list(batches(config, encoder, start=step))
    assert len(rest) == 18 - step and all(same(a, b) for a, b in zip(rest, made[step:], strict=True))


def test_nothing_is_left_after_the_last_step(all_batches, encoder):
    assert list(batches(all_batches[0], encoder, start=18)) == []


def test_another_seed_gives_other_batches(all_batches, encoder):
    config, made = all_batches
    assert not same(next(batches(replace(config, seed=1), encoder)), made[0])


def test_rows_that_are_longer_than_a_batch_still_make_one_each(tiny, encoder):
    config = tiny(steps=9, batch_tokens=64, lengths=((0.0, 400),))
    made = list(batches(config, encoder))
    assert len(made) == 9 and all(len(batch.ids) == 1 for batch in made)


def test_little_is_padding(encoder):
    config = ReferenceConfig(steps=10 * GROUP, lengths=((0.0, 256), (0.5, 512)))
    tokens = padding = 0
    for batch in batches(config, encoder):
        used = batch.answer | batch.text | (batch.ids != 0)
        last = used.int().flip(1).argmax(1)
        padding += int(last.sum())
        tokens += batch.ids.numel()
        assert 0.5 * config.batch_tokens < batch.ids.numel() < 2 * config.batch_tokens
    assert padding / tokens < 0.15


def test_batches_from_notes_begin_when_they_should(tiny, encoder):
    made = list(batches(tiny(steps=20 * GROUP, notes_from=0.5, notes_share=1.0), encoder))
    assert [batch.visible is not None for batch in made] == [False] * 10 * GROUP + [True] * 10 * GROUP


def test_threads_grow_by_the_curriculum(tiny, encoder):
    made = list(batches(tiny(steps=20 * GROUP, families=("needles",), lengths=((0.0, 100), (0.5, 600))), encoder))
    longest = [max(b.ids.shape[1] for b in part) for part in (made[: 10 * GROUP], made[10 * GROUP :])]
    assert longest[0] < 450 < longest[1]


def test_only_the_named_families(tiny, encoder, tokenizer):
    made = list(batches(tiny(families=("preferences",), steps=8), encoder))
    assert all("preferred" in tokenizer.decode(row) for batch in made for row in batch.ids)


# -- collate and the loss -------------------------------------------------------------------------------------------


def row(n, *, hidden=(), probes=2, seed=0):
    """A thread of `n` random tokens, and probes of four tokens of which three are the answer."""
    ids = np.random.default_rng(seed).integers(3, 2000, n + 4 * probes)
    owner = np.concatenate([np.full(n, -1), np.repeat(np.arange(probes), 4)])
    answer = np.concatenate([np.zeros(n, bool), np.tile([False, True, True, True], probes)])
    return Row(ids, answer, owner, hidden)


def test_collate_pads_on_the_right():
    rows = [row(10), row(4, probes=1, seed=1)]
    batch = collate(rows, random.Random(0), 0.5, masked=True)
    assert batch.ids.shape == (2, 18) and batch.visible.shape == (2, 1, 18, 18)
    for i, one in enumerate(rows):
        n = len(one.ids)
        assert batch.ids[i, :n].tolist() == one.ids.tolist() and not batch.ids[i, n:].any()
        assert batch.answer[i, :n].tolist() == one.answer.tolist()
        assert not (batch.answer | batch.text)[i, n:].any(), "padding is not predicted"
        assert np.array_equal(batch.visible[i, 0, :n, :n].numpy(), one.visible())
        rest = batch.visible[i, 0].clone()
        rest[:n, :n] = False
        assert torch.equal(rest.nonzero(), torch.tensor([[j, j] for j in range(n, 18)]).reshape(-1, 2))
    assert not (batch.answer & batch.text).any()


def test_a_share_of_the_text_is_predicted():
    rows = [row(2000, seed=seed) for seed in range(3)]
    shares = {share: collate(rows, random.Random(0), share, masked=False).text for share in (0.0, 0.25, 1.0)}
    assert not shares[0.0].any() and shares[1.0].sum() == sum((~r.answer[1:]).sum() for r in rows)
    assert shares[0.25].float().mean() == pytest.approx(0.25, abs=0.02)
    assert collate(rows, random.Random(0), 0.5, masked=False).visible is None
    again = collate(rows, random.Random(0), 0.25, masked=False).text
    assert torch.equal(again, shares[0.25])


@pytest.fixture(scope="module")
def model(tiny, model_of):
    return model_of(tiny())


def loss(model, batch, **kw):
    return loss_of(model, batch, **{"text_weight": 0.2, "dtype": torch.float32, **kw})


def test_the_loss_is_that_of_plain_transformers(model):
    batch = collate([row(12), row(9, seed=1)], random.Random(0), 0.5, masked=False)
    total, parts = loss(model, batch)
    with torch.no_grad():
        logits = model(batch.ids).logits[:, :-1]
    want = {}
    for name in ("answer", "text"):
        chosen = getattr(batch, name)[:, 1:]
        want[name] = cross_entropy(logits[chosen], batch.ids[:, 1:][chosen])
        assert parts[name] == pytest.approx(float(want[name]), abs=1e-5)
    assert total.item() == pytest.approx(float(want["answer"] + 0.2 * want["text"]), abs=1e-5)
    right = (logits.argmax(-1) == batch.ids[:, 1:])[batch.answer[:, 1:]].float().mean()
    assert parts["right"] == pytest.approx(float(right))


def test_a_mask_that_hides_nothing_changes_nothing(model):
    """One probe per row: all earlier tokens are visible, as in causal attention."""
    rows = [row(12, probes=1), row(7, probes=1, seed=1)]
    masked, causal = (loss(model, collate(rows, random.Random(0), 0.5, masked=m)) for m in (True, False))
    assert masked[1] == pytest.approx(causal[1], abs=1e-5) and masked[0].item() == pytest.approx(causal[0].item())


def test_hidden_tokens_and_other_probes_do_not_count(model):
    """Whatever stands in hidden tokens, or in the other probe, the second probe's answer has the same loss."""
    one = row(12, hidden=((1, (2, 6)),))
    ids = one.ids.copy()
    ids[2:6], ids[12:16] = 7, 9
    batches_of = [collate([replace(one, ids=i)], random.Random(0), 0.0, masked=True) for i in (one.ids, ids)]
    for batch in batches_of:
        batch.answer[:, :16] = False
    # The tokens of the thread behind the hidden ones have read them: only a model of one layer could not tell.
    shallow = replace_layers(model, 1)
    first, second = (loss(shallow, batch)[1]["answer"] for batch in batches_of)
    assert first == pytest.approx(second, abs=1e-5)
    deep = [loss(model, batch)[1]["answer"] for batch in batches_of]
    assert abs(deep[0] - deep[1]) > 1e-5, "these are the notes"


def replace_layers(model, n):
    shallow = deepcopy(model)
    shallow.model.layers = shallow.model.layers[:n]
    shallow.config.num_hidden_layers = n
    return shallow


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_loss_is_finite_and_has_a_gradient(model, share):
    for masked in (False, True):
        total, parts = loss(model, collate([row(12)], random.Random(0), share, masked=masked))
        total.backward()
        assert total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
        assert (parts["text"] == 0) == (share == 0)
    model.zero_grad()


def test_bfloat16_is_close(model):
    batch = collate([row(12), row(9, seed=1)], random.Random(0), 0.5, masked=True)
    exact, rough = loss(model, batch)[1], loss(model, batch, dtype=torch.bfloat16)[1]
    assert rough["answer"] == pytest.approx(exact["answer"], rel=0.02)


# -- accuracy -------------------------------------------------------------------------------------------------------


class Scripted(torch.nn.Module):
    """Scripted, no model: predicts every next token rightly, except where told to err."""

    def __init__(self, wrong=lambda ids: set()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.wrong = wrong
        self.masks = []

    def forward(self, ids, attention_mask, use_cache):
        self.masks.append(attention_mask)
        likely = torch.roll(ids, -1, 1)
        for i in self.wrong(ids[0].tolist()):
            likely[0, i - 1] = 0
        return SimpleNamespace(logits=torch.nn.functional.one_hot(likely, 2048).float())


def accuracy(model, encoder, **kw):
    common = dict(length=100, seed=0, n=3, hidden=False, dtype=torch.float32)
    return probe_accuracy(model, encoder, **{**common, **kw})


def test_accuracy_of_scripted_predictions(encoder, tokenizer):
    perfect = accuracy(Scripted(), encoder)
    assert perfect == dict.fromkeys(perfect, 1.0) and len(perfect) == 7
    dot = tokenizer.convert_tokens_to_ids(".")
    every_dot = Scripted(lambda ids: {i for i, token in enumerate(ids) if token == dot})
    assert accuracy(every_dot, encoder, families=("facts",)) == {"facts": 0.0}, "one wrong token spoils an answer"
    last_row = Scripted(lambda ids: {len(ids) - 2})
    assert 0 < accuracy(last_row, encoder, families=("needles",))["needles"] < 1
    question = Scripted(lambda ids: {1, 2, 3})
    assert accuracy(question, encoder, families=("facts",)) == {"facts": 1.0}, "only answers count"


def test_accuracy_from_notes_hides_the_spans(encoder):
    seen, hidden = Scripted(), Scripted()
    assert accuracy(hidden, encoder, families=("needles",), hidden=True) == {"needles": 1.0}
    accuracy(seen, encoder, families=("needles",))
    shut = [[int((mask < -1e30).sum()) for mask in model.masks] for model in (seen, hidden)]
    assert [mask.shape for mask in seen.masks] == [mask.shape for mask in hidden.masks], "all needles are mentioned"
    assert all(some < more for some, more in zip(*shut, strict=True))
    assert set(accuracy(Scripted(), encoder, families=("documents",), split="test", hidden=True)) == {"documents"}


def test_chance_is_zero(model, encoder):
    assert max(accuracy(model, encoder).values()) < 0.1
