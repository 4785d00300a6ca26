"""The corpus of retractable agent traces: deterministic by seed, endless, in plain English. Start here.

Every trace carries retractable spans and probes with the right answer with each span and without it, so it measures
any chat model (`kv-retract corpus`), and it is what the bundled model is trained on. Splits hold out names, wordings
and the whole family `documents`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from ..errors import KVRetractError
from .families import FAMILIES, HELD_OUT
from .filler import filler
from .names import SPLITS, Names, Split
from .samples import CorpusSample
from .threads import TextLength, Writer, assemble


class CorpusError(KVRetractError, ValueError):
    """What is asked of the corpus does not exist."""


def rough_length(text: str) -> int:
    """Estimate the tokens of a text without a tokenizer."""
    return len(text) // 4


def generate(
    family: str,
    *,
    seed: int,
    length: int = 512,
    split: Split = "train",
    size: int | None = None,
    mentions: float = 0.7,
    tokens: TextLength = rough_length,
) -> CorpusSample:
    """Return one trace; the same arguments give the same trace.

    Args:
        family: one of `FAMILIES.names()`.
        seed: of all chance in it.
        length: tokens of the trace, about; reached by filler.
        split: `train`, or `test` with names and wordings that training never sees.
        size: how many things the trace is about; by default 4, and more in longer traces.
        mentions: probability that a later turn names a subject again, without its value.
        tokens: length of a text in tokens.

    Raises:
        UnknownNameError: no family has the name.
        CorpusError: the split does not exist, the length is below 64, the size below 1, or the held-out family is
            asked for training.
    """
    if split not in SPLITS:
        raise CorpusError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
    if family == HELD_OUT and split == "train":
        raise CorpusError(f"family {HELD_OUT!r} is held out: ask for split='test'")
    if length < 64:
        raise CorpusError(f"expected a length of at least 64 tokens, got {length}")
    if size is not None and size < 1:
        raise CorpusError(f"expected a size of at least 1, got {size}")
    rng = random.Random(f"{family}/{split}/{seed}/{length}")
    size = size or min(16, 4 + length // 512)
    writer = Writer(rng=rng, split=split, names=Names(rng, split), size=size, mentions=mentions)
    draft = FAMILIES.create(family, writer=writer)
    messages, spans = assemble(draft, writer, lambda: filler(writer), length=length, tokens=tokens)
    return CorpusSample(
        sample_id=f"{family}-{split}-{length}-{seed}",
        family=family,
        split=split,
        messages=messages,
        tools=tuple(draft.tools),
        spans=spans,
        probes=tuple(draft.probes),
    )


def samples(
    family: str, n: int, *, seed: int = 0, make: Callable[..., CorpusSample] = generate, **options: object
) -> Iterator[CorpusSample]:
    """Yield `n` traces of consecutive seeds from `seed` on; options as for `generate`."""
    return (make(family, seed=seed + number, **options) for number in range(n))


def training_families() -> list[str]:
    """Return the families that models are trained on."""
    return [name for name in FAMILIES.names() if name != HELD_OUT]
