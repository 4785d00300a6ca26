"""Batches of threads with spans to erase: of real text in stage 1, of the corpus in stage 2."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .config import longest_at
from .corpus import generate, training_families
from .edits import EditRow, edit_of_sample, edit_of_text, log_uniform
from .encoding import IntArray, RowEncoder, choose_spans
from .eraser_config import EraserTraining
from .steering import EditBatch, collate_edits
from .texts import draw_text, piece_of

AHEAD = 48
"""Tokens of a continuation, and of a span's neighbors at most."""
MOST_FACTS = 24
"""What a thread of the corpus is about, at most: enough to take many back and to keep others."""


def edit_batches(
    config: EraserTraining,
    encoder: RowEncoder,
    texts: Sequence[IntArray],
    *,
    start: int = 0,
    prepared: Callable[[EditBatch], Any] = lambda batch: batch,
    workers: int = 0,
) -> Iterator[Any]:
    """Yield the batches from step `start` on, `accumulate` each; they depend on configuration, texts and step only.

    Args:
        config: of the run.
        encoder: of the model's tokenizer.
        texts: real text.
        start: first step.
        prepared: what is made of each, once for all times that it is learnt from.
        workers: processes that draw batches ahead; 0: none but this one.
    """
    places = list(_numbers(config, start * config.accumulate))
    new = list(dict.fromkeys(number for number, _ in places))
    loader = DataLoader(
        _Draws(config, encoder, texts), batch_size=None, sampler=new, num_workers=workers, generator=torch.Generator()
    )  # fmt: skip
    drawn = iter(loader)
    kept: dict[int, Any] = {}
    for number, again in places:
        if number not in kept:
            kept[number] = prepared(next(drawn))
        yield kept[number] if again else kept.pop(number)


@dataclass(frozen=True, slots=True)
class _Draws(Dataset[EditBatch]):
    """The batches of a run, by number."""

    config: EraserTraining
    encoder: RowEncoder
    texts: Sequence[IntArray]

    def __getitem__(self, number: int) -> EditBatch:
        return _batch(self.config, self.encoder, self.texts, number)


def _numbers(config: EraserTraining, start: int) -> Iterator[tuple[int, bool]]:
    """Yield which batch is learnt from at each place, from `start` on, and whether it will be again.

    In rounds: `kept_batches` new ones in order, then the same in another order, `reuse` times in all.
    """
    size, end = config.kept_batches, config.steps * config.accumulate
    for round_ in range(start // size, -(-end // size)):
        turn, time = divmod(round_, config.reuse)
        order = list(range(size))
        if time:
            random.Random(f"order/{config.seed}/{turn}/{time}").shuffle(order)
        for place in range(max(start, round_ * size), min(end, (round_ + 1) * size)):
            yield turn * size + order[place - round_ * size], time + 1 < config.reuse


def _batch(config: EraserTraining, encoder: RowEncoder, texts: Sequence[IntArray], number: int) -> EditBatch:
    step, rng = number * config.reuse // config.accumulate, random.Random(f"eraser/{config.seed}/{number}")
    length = max(200, int(longest_at(config.lengths, step / config.steps) * rng.choice((0.25, 0.5, 1.0))))
    pretrain = step < config.first_stage_steps
    rows = []
    for _ in range(max(1, config.batch_tokens // length)):
        is_text = pretrain or rng.random() < config.text_share
        rows.append(
            _text_row(config, encoder, texts, length, rng) if is_text else draw_edit(config, encoder, length, rng)
        )
    return collate_edits(rows, weights=config.weights)


def draw_edit(
    config: EraserTraining, encoder: RowEncoder, length: int, rng: random.Random, *, families: Sequence[str] = ()
) -> EditRow:
    """Draw a thread of the corpus, spans of it to be erased together, and probes of both kinds."""
    while True:
        sample = generate(
            rng.choice(families or training_families()), seed=rng.randrange(10**9), length=length,
            tokens=encoder.length, size=rng.randint(2, max(3, min(MOST_FACTS, length // 60))),
            mentions=rng.choice((0.5, 0.8, 1.0)),
        )  # fmt: skip
        possible = sorted(choose_spans(sample, rng, share=1.0))
        alone = config.single_share and rng.random() < config.single_share
        spans = set(rng.sample(possible, 1 if alone else min(len(possible), log_uniform(config.most_spans, rng))))
        affected = [probe for probe in sample.probes if spans & set(probe.without)]
        others = [probe for probe in sample.probes if not spans & set(probe.without)]
        if spans and all(len(spans & set(probe.without)) == 1 for probe in affected):
            break
    rng.shuffle(affected)
    rng.shuffle(others)
    affected = affected[: max(1, config.most_probes // 2)]
    probes = affected + others[: config.most_probes - len(affected)]
    return edit_of_sample(encoder, sample, probes, spans, with_tools=rng.random() < 0.3)


def _text_row(
    config: EraserTraining, encoder: RowEncoder, texts: Sequence[IntArray], length: int, rng: random.Random
) -> EditRow:
    """Return a piece of a real text, or else of a thread of the corpus."""
    long = [text for text in texts if len(text) >= 3 * AHEAD]
    if long and rng.random() < config.real_share:
        text = draw_text(long, rng)
    else:
        sample = generate(
            rng.choice(training_families()), seed=rng.randrange(10**9), length=length + 200, tokens=encoder.length
        )
        text = encoder.thread(sample, with_tools=False)[0]
    piece = piece_of(text, length, rng)
    return edit_of_text(
        piece, rng, marks=encoder.marks, turn_share=config.turn_share, most_spans=config.most_spans, ahead=AHEAD
    )
