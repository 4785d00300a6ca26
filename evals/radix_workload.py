"""A server's day as a prefix index sees it: agent threads with shared prefixes, their turns interleaved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kv_retract.cache.base import IntArray

SYSTEMS = 16
"""System prompts with tools, and `DOCUMENTS` shared documents under each."""
DOCUMENTS = 4
SYSTEM_TOKENS = (700, 2000)
DOCUMENT_TOKENS = (200, 1500)
TURN_TOKENS = (20, 400)
"""Of a new message, and of an answer."""
TURNS = (2, 6)
FORKED = 0.2
"""Share of threads that go on from a turn of an earlier thread."""
AT_WORK = 64
"""Threads that take their turns in between each other."""
_VOCABULARY = 128_000


class Step(NamedTuple):
    """One agent step: match the first `asked` tokens of a thread, then index its first `end` tokens."""

    thread: int
    asked: int
    """The thread so far with the new message."""
    end: int
    """With the answer as well."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Threads and the order of their steps."""

    ids: list[IntArray]
    """Tokens of each thread at its end."""
    steps: list[Step]


def make_workload(threads: int, seed: int) -> Workload:
    """Return threads that are a function of the seed.

    Each begins with one of `SYSTEMS` prompts, some far more often than others, and one of its documents, or with an
    earlier thread up to the end of one of its turns.
    """
    rng = np.random.default_rng(seed)
    prefixes = _prefixes(rng)
    popularity = 1.0 / np.arange(1, SYSTEMS + 1)
    ids: list[IntArray] = []
    turns: list[list[tuple[int, int]]] = []
    for number in range(threads):
        if number and rng.random() < FORKED:
            parent = int(rng.integers(number))
            prefix = ids[parent][: turns[parent][int(rng.integers(len(turns[parent])))][1]]
        else:
            system = int(rng.choice(SYSTEMS, p=popularity / popularity.sum()))
            prefix = prefixes[system][int(rng.integers(DOCUMENTS))]
        lengths = _between(rng, TURN_TOKENS, 2 * _one(rng, TURNS))
        ends = (len(prefix) + np.cumsum(lengths)).tolist()
        ids.append(np.concatenate([prefix, _tokens(rng, int(lengths.sum()))]))
        turns.append(list(zip(ends[::2], ends[1::2], strict=True)))
    return Workload(ids, _interleaved(rng, turns))


def _interleaved(rng: np.random.Generator, turns: list[list[tuple[int, int]]]) -> list[Step]:
    """Let `AT_WORK` threads take turns in random order; where one ends the next begins."""
    steps: list[Step] = []
    waiting = iter(enumerate(turns))
    at_work = [(thread, iter(own)) for (thread, own), _ in zip(waiting, range(AT_WORK), strict=False)]
    while at_work:
        place = int(rng.integers(len(at_work)))
        thread, left = at_work[place]
        if (turn := next(left, None)) is not None:
            steps.append(Step(thread, *turn))
        elif (following := next(waiting, None)) is not None:
            at_work[place] = (following[0], iter(following[1]))
        else:
            at_work.pop(place)
    return steps


def _prefixes(rng: np.random.Generator) -> list[list[IntArray]]:
    """Return what threads begin with, by system prompt and document."""
    found = []
    for _ in range(SYSTEMS):
        system = _tokens(rng, _one(rng, SYSTEM_TOKENS))
        documents = [_tokens(rng, _one(rng, DOCUMENT_TOKENS)) for _ in range(DOCUMENTS)]
        found.append([np.concatenate([system, document]) for document in documents])
    return found


def _tokens(rng: np.random.Generator, count: int) -> IntArray:
    return rng.integers(0, _VOCABULARY, count)


def _between(rng: np.random.Generator, bounds: tuple[int, int], count: int) -> IntArray:
    return rng.integers(bounds[0], bounds[1], count, endpoint=True)


def _one(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(_between(rng, bounds, 1)[0])
