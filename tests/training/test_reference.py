"""The reference model's loss and accuracy; how it trains is in `test_reference_run.py`."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from kv_retract.training.reference import loss_of, probe_accuracy

from .rows import row, together

# -- the loss -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny, model_of):
    return model_of(tiny())


def loss(model, batch, **kw):
    return loss_of(model, batch, **{"dtype": torch.float32, **kw})


def test_the_loss_is_that_of_plain_transformers(model):
    """One probe per row: it sees all that stands before it, as in causal attention."""
    batch = together([row(12, probes=1), row(9, probes=1, seed=1)], 0.5)
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


def test_hidden_tokens_and_other_probes_do_not_count(model):
    """Whatever stands in hidden tokens, or in the other probe, the second probe's answer has the same loss."""
    one = row(12, hidden=((1, (2, 6)),))
    ids = one.ids.copy()
    ids[2:6], ids[12:16] = 7, 9
    batches_of = [together([replace(one, ids=i)], 0.0) for i in (one.ids, ids)]
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
    total, parts = loss(model, together([row(12)], share))
    total.backward()
    assert total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert ("text" in parts) == (share == 1) and parts["answer"] > 0
    model.zero_grad()


def test_a_batch_may_have_nothing_to_predict(model):
    total, parts = loss(model, together([row(12, probes=0)], 0.0))
    total.backward()
    assert total.item() == 0 and parts == {}
    model.zero_grad()


def test_bfloat16_is_close(model):
    batch = together([row(12), row(9, seed=1)], 0.5)
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
    common = dict(length=100, seed=0, n=3, dtype=torch.float32)
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
