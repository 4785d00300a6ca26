"""Batches of threads with probes behind them: each depends on the configuration and its step only."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ..engine.working import additive_mask
from .config import ReferenceConfig, longest_at
from .corpus import generate, training_families
from .encoding import IntArray, Row, RowEncoder, choose_spans
from .texts import draw_text, piece_of

GROUP = 4
"""Batches whose rows are drawn together and sorted by length."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded rows."""

    ids: torch.Tensor
    """Shape: (num_rows, num_tokens)"""
    answer: torch.Tensor
    """Tokens to predict with full weight. Shape: (num_rows, num_tokens), bool"""
    text: torch.Tensor
    """Tokens of the thread to predict. Shape: (num_rows, num_tokens), bool"""
    text_weight: float
    """Weight of those, beside 1 for the answers."""
    visible: torch.Tensor
    """Who sees whom; probes do not see each other. Shape: (num_rows, 1, num_tokens, num_tokens), bool"""

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return `visible` as an additive mask of the same shape."""
        return additive_mask(self.visible.to(device), dtype)


def batches(
    config: ReferenceConfig, encoder: RowEncoder, *, texts: Sequence[IntArray] = (), start: int = 0
) -> Iterator[Batch]:
    """Yield the batches of training from step `start` on; each depends on the configuration, the texts and its step.

    Args:
        config: of the run.
        encoder: of the model's tokenizer.
        texts: token ids of real texts, of which `config.real_share` of the rows are pieces.
        start: first step.
    """
    for group in range(start // GROUP, -(-config.steps // GROUP)):
        rng = random.Random(f"{config.seed}/{group}")
        made = _group(config, encoder, rng, texts, group * GROUP / config.steps)
        yield from made[max(0, start - group * GROUP) : config.steps - group * GROUP]


def _group(
    config: ReferenceConfig, encoder: RowEncoder, rng: random.Random, texts: Sequence[IntArray], progress: float
) -> list[Batch]:
    """Return batches of rows of about the same length, so that little is padding, in random order."""
    length = max(96, int(longest_at(config.lengths, progress) * rng.choice((0.4, 0.6, 0.8, 1.0, 1.0))))
    first = progress < config.notes_first
    notes = first or rng.random() < config.notes_share
    text_weight = config.text_weight * (min(1.0, 0.1 + 0.9 * progress / config.text_from) if config.text_from else 1.0)
    size, with_tools = rng.randint(2, max(3, min(12, length // 60))), rng.random() < 0.3
    rows: list[Row] = []
    tokens = 0
    while tokens < GROUP * config.batch_tokens or len(rows) < GROUP:
        if texts and rng.random() < config.real_share:
            rows.append(_piece(texts, length, rng))
            tokens += len(rows[-1].ids)
            continue
        sample = generate(
            rng.choice(config.families or training_families()), seed=rng.randrange(10**9), length=length,
            tokens=encoder.length, size=size, mentions=rng.choice((0.5, 0.8, 1.0)),
        )  # fmt: skip
        probes = rng.sample(sample.probes, min(8, len(sample.probes)))
        if notes:
            hidden = {s.span_id for s in sample.spans if sample.mentioned_later(s.span_id)}
            only = first or rng.random() < config.notes_only_share
            rows.append(encoder.encode(sample, probes, hidden=hidden, notes_only=only, with_tools=with_tools))
        else:
            removed = choose_spans(sample, rng, share=config.removed_share)
            rows.append(encoder.encode(sample, probes, removed=removed, with_tools=with_tools))
        tokens += len(rows[-1].ids)
    rows.sort(key=lambda row: len(row.ids))
    made = [collate(part, rng, text_share=config.text_share, text_weight=text_weight) for part in _parts(rows, tokens)]
    rng.shuffle(made)
    return made


def _piece(texts: Sequence[IntArray], length: int, rng: random.Random) -> Row:
    """Return a piece of a text, every token of all texts as likely to be in it; shorter where the text is."""
    ids = piece_of(draw_text(texts, rng), length, rng)
    return Row(ids, np.zeros(len(ids), np.bool_), np.full(len(ids), -1))


def _parts(rows: Sequence[Row], tokens: int) -> list[Sequence[Row]]:
    """Cut rows into `GROUP` parts of about as many tokens each, none of them empty."""
    sums = list(accumulate(len(row.ids) for row in rows))
    cuts = [0]
    for i in range(1, GROUP):
        cut = bisect_left(sums, tokens * i / GROUP) + 1
        cuts.append(min(max(cut, cuts[-1] + 1), len(rows) - GROUP + i))
    return [rows[a:b] for a, b in zip(cuts, [*cuts[1:], len(rows)], strict=True)]


def collate(rows: Sequence[Row], rng: random.Random, *, text_share: float, text_weight: float) -> Batch:
    """Pad rows on the right; a random share of the thread's tokens is to be predicted."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    answer, text = torch.zeros(len(rows), longest, dtype=torch.bool), torch.zeros(len(rows), longest, dtype=torch.bool)
    visible = torch.zeros(len(rows), 1, longest, longest, dtype=torch.bool)
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], answer[i, :n] = torch.from_numpy(row.ids), torch.from_numpy(row.answer)
        text[i, :n] = ~answer[i, :n] & (torch.rand(n, generator=generator) < text_share)
        visible[i, 0, :n, :n] = torch.from_numpy(row.visible())
        visible[i, 0].fill_diagonal_(True)  # padding sees itself, so that no row of the softmax is empty
    answer[:, 0] = text[:, 0] = False
    return Batch(ids, answer, text, text_weight, visible)
