"""Train the corpus tokenizer anew: `python -m kv_retract.training.tokenizer --out DIR [FILE ...]`.

Counts merges in traces of the corpus and in a quarter of the texts of other files (chats as `build_tokenizer` reads
them), so that ordinary English is not spelt out. The same files give the same tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..reference.build_tokenizer import run_program, train
from .corpus import generate, training_families
from .names import FIRST

VOCAB_SIZE = 2048
_ROLES = ("system", "user", "assistant", "tool")
_REPEATS = 5000
"""Roles stand in every message but in no content, and syllables are drawn evenly; this makes them single tokens."""
_SHARE_OF_OTHERS = 4


def corpus_texts(num_traces: int, *, seed: int = 10**6, length: int = 300) -> Iterator[str]:
    """Yield contents, calls, tools, questions and answers of `num_traces` traces of each family."""
    for family in training_families():
        for number in range(num_traces):
            sample = generate(family, seed=seed + number, length=length)
            for message in sample.messages:
                yield message.content
                for call in message.tool_calls:
                    yield call.arguments
                    yield json.dumps({"name": call.name, "arguments": {}})
            for probe in sample.probes:
                yield probe.question
                yield probe.answer
            yield from (json.dumps(tool) for tool in sample.tools)


def train_tokenizer(others: Iterable[str] = (), *, num_traces: int = 40) -> Any:
    """Return a tokenizer of `VOCAB_SIZE` entries with the bundled chat template.

    Few traces: rarer words of the corpus stay in pieces, so that the model learns to copy words from their pieces.
    """
    texts = sorted(others)
    random.Random(0).shuffle(texts)
    texts = [*corpus_texts(num_traces), *texts[: len(texts) // _SHARE_OF_OTHERS], *((*_ROLES, *FIRST) * _REPEATS)]
    return train(texts, vocab_size=VOCAB_SIZE, digits=2, split_names=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and write the folder."""
    run_program(argv, train_tokenizer, description="Train the corpus tokenizer.", files="*")


if __name__ == "__main__":
    main()
