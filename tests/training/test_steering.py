"""Student and teacher of an eraser against plain forward passes; the loss; where gradients go."""

import random

import numpy as np
import pytest
import torch

from kv_retract.engine.support import inspect_model
from kv_retract.erasers.kveraser import VARIANTS, KVEraserConfig
from kv_retract.erasers.kveraser.model import new_net
from kv_retract.training.edits import edit_of_text
from kv_retract.training.eraser_batches import draw_edit
from kv_retract.training.eraser_config import EraserTraining
from kv_retract.training.steering import collate_edits, edit_loss, read, student_logits, teacher_logits

WEIGHTS = EraserTraining().weights
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def model(tiny, model_of):
    return model_of(tiny(num_layers=3)).requires_grad_(False)


@pytest.fixture(scope="module")
def rotary(model):
    return inspect_model(model)[1]


@pytest.fixture(scope="module")
def rows(encoder):
    rng = random.Random(0)
    drawn = [draw_edit(EraserTraining(), encoder, length, rng) for length in (200, 300)]
    return [*drawn, edit_of_text(np.random.default_rng(0).integers(3, 2000, 250), rng)]


def net_of(model, variant, spread=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = new_net(model, KVEraserConfig(variant=variant, rank=4, hidden=16))
        for parameter in net.parameters():
            parameter.data += spread * torch.randn(parameter.shape)
    return net


def slices(row):
    """Each query of a row with its place among all of them."""
    at = 0
    for query in row.queries:
        yield query, slice(at, at + len(query.ids))
        at += len(query.ids)


def test_the_teacher_reads_the_thread_that_never_had_the_spans(model, rows):
    logits = teacher_logits(model, collate_edits(rows, weights=WEIGHTS))
    for row, found in zip(rows, logits, strict=True):
        for query, place in slices(row):
            before = row.without_spans()[: row.sees_without_spans(query)]
            plain = model(torch.from_numpy(np.concatenate([before, query.ids]))[None]).logits[0, -len(query.ids) :]
            torch.testing.assert_close(found[place], plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["blind", "kv_map"])
def test_a_fresh_student_reads_the_thread_as_it_is(model, rows, rotary, variant):
    logits = student_logits(model, net_of(model, variant), collate_edits(rows, weights=WEIGHTS), rotary=rotary)
    for row, found in zip(rows, logits, strict=True):
        for query, place in slices(row):
            ids = torch.from_numpy(np.concatenate([row.thread[: query.sees], query.ids]))
            plain = model(ids[None]).logits[0, -len(query.ids) :]
            torch.testing.assert_close(found[place], plain, atol=1e-4, rtol=0)


@each_variant
def test_a_batch_that_was_read_before_is_edited_again_and_again(model, rows, rotary, variant):
    """The same logits as without, and nothing of an edit is left for the next one."""
    known = read(model, collate_edits(rows, weights=WEIGHTS))
    net, states = net_of(model, variant, spread=0.05), [layer.keys.clone() for layer in known.cache.layers]
    fresh = student_logits(model, net, known.batch, rotary=rotary)
    for _ in range(2):
        assert torch.equal(student_logits(model, net, known.batch, rotary=rotary, cache=known.cache), fresh)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(known.cache.layers, states, strict=True))
    assert torch.equal(known.teacher, teacher_logits(model, known.batch))


@each_variant
def test_rows_do_not_see_each_other_nor_padding(model, rows, rotary, variant):
    net = net_of(model, variant, spread=0.05)
    together = student_logits(model, net, collate_edits(rows, weights=WEIGHTS), rotary=rotary)
    for row, found in zip(rows, together, strict=True):
        alone = student_logits(model, net, collate_edits([row], weights=WEIGHTS), rotary=rotary)[0]
        torch.testing.assert_close(found[: len(alone)], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["blind", "suffix_aware"])
def test_one_pass_equals_two_phases(model, rows, variant):
    net, batch = net_of(model, variant, spread=0.05), collate_edits(rows, weights=WEIGHTS)
    two, one = student_logits(model, net, batch), student_logits(model, net, batch, whole=True)
    weighed = batch.weight > 0
    torch.testing.assert_close(two[weighed], one[weighed], atol=1e-4, rtol=0)


def test_one_pass_of_the_teacher_equals_two_phases(model, rows):
    batch = collate_edits(rows, weights=WEIGHTS)
    a, b = teacher_logits(model, batch), teacher_logits(model, batch, whole=True)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_the_loss_is_the_weighted_mean_divergence(model, rows):
    batch = collate_edits(rows, weights=WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.queries.shape, 50)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    total = weights = 0.0
    for i, row in enumerate(rows):
        for query, place in slices(row):
            for t in range(place.start + query.first, place.stop):
                p, q = teacher[i, t - 1].softmax(-1), student[i, t - 1].softmax(-1)
                total += WEIGHTS[query.kind] * float((p * (p.log() - q.log())).sum())
                weights += WEIGHTS[query.kind]
    assert float(edit_loss(student, teacher, batch)) == pytest.approx(total / weights, rel=1e-4)
    assert float(edit_loss(teacher, teacher, batch)) == pytest.approx(0.0, abs=1e-6)


@each_variant
def test_gradients_reach_the_net_and_nothing_else(model, rows, rotary, variant):
    net, batch = net_of(model, variant, spread=0.05), collate_edits(rows, weights=WEIGHTS)
    edit_loss(student_logits(model, net, batch, rotary=rotary), teacher_logits(model, batch), batch).backward()
    # In the last layer only keys and values of a span are read.
    unread = {f"{part}.model/layers/2/{name}" for part in "ab" for name in
              ("self_attn/q_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")}  # fmt: skip
    for name, parameter in net.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (name not in unread), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
