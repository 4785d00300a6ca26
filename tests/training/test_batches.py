"""Batches of the reference model's training: one per step, cut evenly, masked as rows say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_retract.training.batches import GROUP, batches
from kv_retract.training.config import ReferenceConfig

from .rows import row, together


def same(a, b):
    tensors = [(getattr(a, name), getattr(b, name)) for name in ("ids", "answer", "text", "visible")]
    return a.text_weight == b.text_weight and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture(scope="module")
def all_batches(tiny, encoder):
    config = tiny(steps=18)
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


def seen_of_the_thread(batch):
    """By row, the share of the thread's tokens that its last answer sees."""
    first = [int(answers.nonzero().min()) for answers in batch.answer]  # behind the thread and the first question
    last = [int(answers.nonzero().max()) for answers in batch.answer]
    return [float(batch.visible[i, 0, q, :n].float().mean()) for i, (n, q) in enumerate(zip(first, last, strict=True))]


def test_first_all_rows_are_answered_from_mentions_alone(tiny, encoder):
    """Only what nobody mentions again is not hidden from its probe."""
    config = tiny(steps=20 * GROUP, notes_first=0.5, notes_share=0.0, families=("facts",))
    shares = [np.mean(seen_of_the_thread(batch)) for batch in batches(config, encoder)]
    assert np.mean(shares[: 10 * GROUP]) < 0.6 and min(shares[10 * GROUP :]) > 0.8


def test_the_weight_of_the_text_grows(tiny, encoder):
    weights = [b.text_weight for b in batches(tiny(steps=10 * GROUP, text_weight=0.4, text_from=0.5), encoder)]
    assert weights[0] == pytest.approx(0.04) and weights[-1] == 0.4 and weights == sorted(weights)
    assert {b.text_weight for b in batches(tiny(steps=GROUP, text_weight=0.4, text_from=0.0), encoder)} == {0.4}


def test_threads_grow_by_the_curriculum(tiny, encoder):
    made = list(batches(tiny(steps=20 * GROUP, families=("needles",), lengths=((0.0, 100), (0.5, 600))), encoder))
    longest = [max(b.ids.shape[1] for b in part) for part in (made[: 10 * GROUP], made[10 * GROUP :])]
    assert longest[0] < 450 < longest[1]


def test_only_the_named_families(tiny, encoder, tokenizer):
    made = list(batches(tiny(families=("preferences",), steps=8), encoder))
    assert all("preferred" in tokenizer.decode(row) for batch in made for row in batch.ids)


def test_a_share_of_the_rows_are_pieces_of_real_text(tiny, encoder):
    texts = [np.arange(1000, 1400), np.arange(5, 45)]
    config = tiny(steps=30 * GROUP, real_share=0.3, lengths=((0.0, 200),))
    rows = [
        batch.ids[i][batch.ids[i] != 0]
        for batch in batches(config, encoder, texts=texts)
        for i in range(len(batch.ids))
    ]
    pieces = [row for row in rows if (row.diff() == 1).all()]
    assert len(pieces) / len(rows) == pytest.approx(0.3, abs=0.05)
    assert all(len(piece) <= 200 and int(piece[0]) in {5, *range(1000, 1400)} for piece in pieces)
    from_long = sum(int(piece[0]) >= 1000 for piece in pieces) / len(pieces)
    assert from_long == pytest.approx(10 / 11, abs=0.08) and len({int(piece[0]) for piece in pieces}) > 20
    assert not any(
        b.answer[i].any()
        for b in batches(config, encoder, texts=texts)
        for i in range(len(b.ids))
        if (b.ids[i][b.ids[i] != 0].diff() == 1).all()
    )


def test_collate_pads_on_the_right():
    rows = [row(10), row(4, probes=1, seed=1)]
    batch = together(rows, 0.5)
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
    shares = {share: together(rows, share).text for share in (0.0, 0.25, 1.0)}
    assert not shares[0.0].any() and shares[1.0].sum() == sum((~r.answer[1:]).sum() for r in rows)
    assert shares[0.25].float().mean() == pytest.approx(0.25, abs=0.02)
    again = together(rows, 0.25).text
    assert torch.equal(again, shares[0.25])
