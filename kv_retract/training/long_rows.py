"""Long threads to learn landmarks from: token ids, questions behind them, and where the answers stand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..engine.bilayer import BiLayer
from ..types import Interval
from .acre_config import AcreTraining
from .config import longest_at
from .corpus import generate, training_families
from .encoding import IntArray, RowEncoder
from .texts import draw_text, piece_of

FAMILIES = tuple(family for family in training_families() if family != "injections")
"""What threads are drawn from. No question names an injection, and nothing should learn to bring one back."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A question behind a thread."""

    asked: IntArray
    """The question, up to where the answer begins. Shape: (num_tokens,)"""
    told: IntArray
    """The right answer. Shape: (num_tokens,)"""
    evidence: tuple[Interval, ...]
    """Where it stands in the thread; none where the thread does not tell."""


@dataclass(frozen=True, slots=True, eq=False)
class LongRow:
    """One thread, how it is cut, and what is asked."""

    ids: IntArray
    """Shape: (num_tokens,)"""
    settings: BiLayer
    questions: tuple[Asked, ...] = ()

    @property
    def num_windows(self) -> int:
        """Kept apart; at least 2."""
        return self.settings.moved(len(self.ids))

    def to_find(self, question: Asked) -> list[Interval]:
        """Return the evidence that is seen only when it is brought back: what ends before the last window's end."""
        end = self.num_windows * self.settings.window - self.settings.overlap
        return [span for span in question.evidence if span[1] <= end]

    def targets(self, question: Asked) -> NDArray[np.float32] | None:
        """Return which share of that evidence stands where: each span counts as much, each of its blocks as well.

        Shape: (num_landmarks,); None where there is none.
        """
        spans, size = self.to_find(question), self.settings.ratio
        if not spans:
            return None
        shares = np.zeros(self.num_windows * self.settings.window // size, np.float32)
        for start, end in spans:
            blocks = slice(start // size, (end - 1) // size + 1)
            shares[blocks] += 1 / (blocks.stop - blocks.start) / len(spans)
        return shares


def long_rows(
    config: AcreTraining, encoder: RowEncoder, texts: Sequence[IntArray], *, start: int = 0
) -> Iterator[LongRow]:
    """Yield the threads from step `start` on, `accumulate` each; they depend on configuration, texts and step only.

    Texts that are shorter than `config.shortest` are left out.
    """
    texts = [text for text in texts if len(text) >= config.shortest]
    for number in range(start * config.accumulate, config.steps * config.accumulate):
        step, rng = number // config.accumulate, random.Random(f"acre/{config.seed}/{number}")
        length = int(longest_at(config.lengths, step / config.steps) * rng.choice((0.5, 1.0)))
        if texts and rng.random() < config.real_share:
            ids = piece_of(draw_text(texts, rng), length, rng)
            yield LongRow(ids, draw_settings(config, len(ids), rng))
        else:
            yield draw_row(config, encoder, length, rng, asks=step >= config.pretrain_steps)


def draw_row(
    config: AcreTraining,
    encoder: RowEncoder,
    length: int,
    rng: random.Random,
    *,
    asks: bool = True,
    families: Sequence[str] = (),
) -> LongRow:
    """Draw a thread of the corpus of about a length, and, where `asks`, questions to it."""
    while True:
        sample = generate(
            rng.choice(families or FAMILIES), seed=rng.randrange(10**9), length=length,
            tokens=encoder.length, size=rng.randint(3, max(4, min(config.most_facts, length // 100))),
            mentions=rng.choice((0.5, 0.8, 1.0)),
        )  # fmt: skip
        ids, tokens_of = encoder.thread(sample, with_tools=rng.random() < 0.3)
        if len(ids) >= config.shortest:
            break
    questions = []
    for probe in rng.sample(sample.probes, min(len(sample.probes), config.most_probes)) if asks else ():
        asked, told = encoder.probe(probe.question, probe.answer)
        evidence = tuple(tokens_of(sample.span(span_id).ref) for span_id in sorted(probe.without))
        questions.append(Asked(asked, told, evidence))
    return LongRow(ids, draw_settings(config, len(ids), rng), tuple(questions))


def draw_settings(config: AcreTraining, length: int, rng: random.Random) -> BiLayer:
    """Draw how a thread is kept, so that two windows or more of it are kept apart.

    Args:
        config: what to draw from; where no window fits twice, the largest that does.
        length: of the thread, at least `config.shortest`.
        rng: where chance comes from.
    """
    assert length >= config.shortest, f"expected a thread of {config.shortest} tokens, got {length}"
    ratio = rng.choice(config.ratios)
    most = (length - config.queries - 1) // 2
    window = rng.choice([size for size in config.windows if size <= most] or [most // ratio * ratio])
    least = window + config.queries
    return BiLayer(
        window=window,
        ratio=ratio,
        overlap=config.overlap,
        local=rng.randint(least, min(least + window, length - window - 1)),
        sinks=config.sinks,
        landmark_positions=config.landmark_positions,
        refill=rng.choice(config.budgets),
        queries=config.queries,
        rounds=config.rounds,
    )
