"""What erasers are trained and measured on: threads drawn from the corpus and from real text, and what is counted."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_retract.engine.support import inspect_model
from kv_retract.erasers.kveraser import VARIANTS, KVEraserConfig
from kv_retract.erasers.kveraser.model import new_net
from kv_retract.testing.erasers import thread_ids
from kv_retract.testing.models import tiny_model
from kv_retract.training.corpus import training_families
from kv_retract.training.edits import EditRow, Query
from kv_retract.training.eraser import measure, validation_of
from kv_retract.training.eraser_batches import AHEAD, draw_edit, edit_batches
from kv_retract.training.eraser_config import EraserTraining

CONFIG = EraserTraining()
ASKED = thread_ids(5, seed=7)
ANSWER = 3
"""Tokens of an answer."""


# -- threads of the corpus ------------------------------------------------------------------------------------------


def test_drawn_edits_ask_about_what_is_erased_and_about_what_is_not(encoder):
    counts, kinds = set(), set()
    for seed in range(60):
        rng = random.Random(seed)
        config = replace(CONFIG, most_spans=rng.choice((1, 2, 4)), most_probes=rng.choice((1, 3, 6)))
        row = draw_edit(config, encoder, rng.choice((200, 400)), rng)
        assert 1 <= len(row.spans) <= config.most_spans and 1 <= len(row.queries) <= config.most_probes
        for (start, end), (behind, _) in zip(row.spans, [*row.spans[1:], (len(row.thread), 0)], strict=True):
            assert 0 <= start < end <= behind
        affected = [query for query in row.queries if query.kind == "affected"]
        assert 1 <= len(affected) <= max(1, config.most_probes // 2)
        for query in affected:
            assert query.lost.tolist() != query.ids[query.first :].tolist(), "the span changes the answer"
        counts.add(len(row.spans))
        kinds |= {query.kind for query in row.queries}
    assert counts >= {1, 2, 3} and kinds == {"affected", "unaffected"}


def test_a_share_of_the_threads_has_one_span_erased_alone(encoder):
    def alone(share):
        config = replace(CONFIG, single_share=share)
        counts = [len(draw_edit(config, encoder, 400, random.Random(seed)).spans) for seed in range(60)]
        return counts.count(1) / len(counts)

    assert alone(1.0) == 1
    assert alone(0.0) + 0.15 < alone(0.6) < 1


@pytest.mark.parametrize("family", training_families())
def test_a_family_may_be_asked_for(encoder, family):
    """The same chance draws the same; another family something else."""
    row, same, other = (
        draw_edit(CONFIG, encoder, 250, random.Random(1), families=(name,))
        for name in (family, family, next(name for name in training_families() if name != family))
    )
    assert np.array_equal(row.thread, same.thread) and row.spans == same.spans
    assert not np.array_equal(row.thread, other.thread)


# -- real text ------------------------------------------------------------------------------------------------------


def threads_of(batch):
    """Threads of a batch without padding."""
    for ids, outside, index, is_span in zip(
        batch.thread, batch.outside, batch.span_index, batch.is_span, strict=True
    ):  # fmt: skip
        size = max(int(outside.nonzero().max()), *index[is_span].tolist()) + 1
        yield ids[:size]


def test_half_of_the_rows_are_of_the_texts(encoder):
    """Texts of one token each, a long and a short one; one below three times the continuation is left out."""
    texts = [np.full(size, token) for size, token in ((9000, 77), (3000, 78), (3 * AHEAD - 1, 79))]
    config = replace(CONFIG, stage="pretrain", pretrain_steps=60, batch_tokens=400, lengths=((0.0, 200),))
    threads = [ids for batch in edit_batches(config, encoder, texts) for ids in threads_of(batch)]
    tokens = [int(ids[0]) if len(set(ids.tolist())) == 1 else 0 for ids in threads]
    share = {token: tokens.count(token) / len(tokens) for token in (0, 77, 78, 79)}
    print(share)
    assert 0.35 < share[0] < 0.65 and share[77] > 1.5 * share[78] > 0 and share[79] == 0
    assert {len(ids) for ids in threads} == {200 - AHEAD}
    none = replace(config, real_share=0.0)
    assert all(len(set(ids.tolist())) > 1 for batch in edit_batches(none, encoder, texts) for ids in threads_of(batch))


def test_threads_grow_in_the_course_of_training(encoder):
    config = replace(
        CONFIG, stage="pretrain", pretrain_steps=40, batch_tokens=600, lengths=((0.0, 300), (0.5, 500), (0.75, 600))
    )
    widths = [batch.thread.shape[1] + AHEAD for batch in edit_batches(config, encoder, [])]
    assert max(widths[:20]) == 300 < max(widths[20:30]) <= 500 < max(widths[30:]) <= 600
    sizes = {(batch.thread.shape[1] + AHEAD, len(batch.thread)) for batch in edit_batches(config, encoder, [])}
    assert all(rows == max(1, 600 // width) for width, rows in sizes)


# -- measurement ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def told(model, thread, length=ANSWER):
    """What a model answers to the question, token by token."""
    ids = np.concatenate([thread, ASKED])
    for _ in range(length):
        ids = np.append(ids, int(model(torch.from_numpy(ids)[None]).logits[0, -1].argmax()))
    return ids[-length:]


def answer(kind, ids, sees, lost=None):
    return Query(kind, np.concatenate([ASKED, ids]), len(ASKED), sees, lost)


@pytest.mark.parametrize("variant", ["blind", "kv_map"])
def test_what_is_counted(variant):
    """Answers as the model gives them with the span, without it, or neither; a fresh eraser erases nothing."""
    model = tiny_model()
    net, rotary = new_net(model, KVEraserConfig(variant=variant, rank=2, hidden=4)), inspect_model(model)[1]
    rows, weights = [], CONFIG.weights
    for seed in (1, 3, 4):
        thread, spans = thread_ids(40, seed=seed), ((10, 16),)
        bare = np.delete(thread, np.r_[10:16])
        kept, clean = told(model, thread), told(model, bare)
        wrong = (kept + 1) % 200 + 3
        assert kept[0] != clean[0] and wrong[0] not in (kept[0], clean[0]), "in these threads the span counts"
        sees, cases = len(thread), [
            ("affected", clean, kept),  # leaks
            ("affected", clean[:2], kept),  # leaks, whatever the length
            ("affected", kept, wrong),  # as a right eraser would answer
            ("affected", clean, wrong),  # wrong, and no leak
            ("affected", np.append(kept[:2], clean[0]), np.append(kept[:2], told(model, thread)[2])),  # at the third
            ("unaffected", kept, None), ("unaffected", wrong, None), ("unaffected", np.append(kept[:2], 3), None),
        ]  # fmt: skip
        rows.append(EditRow(thread, spans, tuple(answer(kind, ids, sees, lost) for kind, ids, lost in cases)))
    found = measure(model, net, rows, CONFIG, rotary)
    assert found["affected"] == 0.2 and found["unaffected"] == round(1 / 3, 4)
    assert found["leak"] == 0.6 and found["teacher_affected"] == 0.6 and found["teacher_unaffected"] == 0.0
    assert found["kl"] == pytest.approx(np.mean([divergence(model, row, weights) for row in rows]), abs=1e-3)


@torch.no_grad()
def divergence(model, row, weights):
    """The weighted mean KL of a thread with its spans from the one without them, query by query."""
    total = weight = 0.0
    for query in row.queries:
        rows = slice(-(len(query.ids) - query.first) - 1, -1)
        p, q = (
            model(torch.from_numpy(np.concatenate([thread, query.ids]))[None]).logits[0, rows].log_softmax(-1)
            for thread in (row.without_spans(), row.thread)
        )
        total += weights[query.kind] * float((p.exp() * (p - q)).sum())
        weight += weights[query.kind] * (len(query.ids) - query.first)
    return total / weight


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_validation_is_the_same_each_time_and_tells_every_family(tiny, model_of, encoder, variant):
    model = model_of(tiny()).eval()
    net, rotary = new_net(model, KVEraserConfig(variant=variant, rank=2, hidden=4)), inspect_model(model)[1]
    first, second = (validation_of(model, net, CONFIG, encoder, rotary, n=1) for _ in range(2))
    assert first == second and set(first) == {
        "validation_kl",
        "affected",
        "unaffected",
        "leak",
        "teacher_affected",
        "teacher_unaffected",
    }
    assert all(set(found) <= set(training_families()) for found in first.values())
    assert set(first["validation_kl"]) == set(first["affected"]) == set(training_families())
    assert len(set(first["validation_kl"].values())) > 1
    assert not net.offset.grad if variant != "kv_map" else net.w1.grad is None
