"""Readers of long threads: each caches one thread in its own way, and then answers questions about it.

Answers are decoded greedily, each on the bare thread. They are not scored in one pass with the right answer in place,
as shorter threads are (`asking`): in a bi-layer cache the tokens of that answer would help to choose what is brought
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import bm25s
import numpy as np
import torch

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.engine.bilayer import BiLayerEngine
from kv_retract.engine.hf import HFEngine
from kv_retract.engine.window_store import Parts, WindowStore
from kv_retract.engine.windows import States
from kv_retract.engine.working import ModelRunner, WorkingSet
from kv_retract.types import Interval, SamplingParams

from .arms import clock

if TYPE_CHECKING:
    from kv_retract.ledger.render import Renderer

MAX_ANSWER = 64
"""Longest answer, in tokens; right ones are shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongThread:
    """A thread as the model reads it."""

    ids: IntArray
    """Shape: (num_tokens,)"""
    contents: tuple[Interval, ...]
    """Tokens of the contents of messages, in order; empty ones left out."""
    borders: IntArray
    """Where messages end: behind each end of a turn, in order. Shape: (num_borders,)"""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids: IntArray, contents: Sequence[Interval], stop_token_ids: Sequence[int]) -> LongThread:
        """Find the borders of messages: `stop_token_ids` end turns."""
        borders = np.flatnonzero(np.isin(ids, stop_token_ids)) + 1
        return cls(ids=ids, contents=tuple(contents), borders=borders)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a reader said, and what it took."""

    text: str
    ttft_ms: float
    """From the question, with the thread cached, to the first token."""
    tokens_refilled: int
    """Tokens of the thread that were brought back for it; in each layer, where layers choose for themselves."""


class Reader:
    """Holds a thread whole.

    Args:
        engine: of its own, empty; the pool need not hold more than the thread with one question and one answer.
        renderer: of the model.

    Attributes:
        edits: what was retracted from the thread; whoever retracts says so here.
    """

    def __init__(self, engine: HFEngine, renderer: Renderer) -> None:
        self.engine: HFEngine | BiLayerEngine = engine
        self.edits: Sequence[KeyEdit] = ()
        self.renderer = renderer
        self._inner, self._runner = engine, _WatchedRunner(engine.model)
        engine.runner = self._runner
        self._ids: IntArray = np.empty(0, np.int64)
        self._held = 0  # tokens in the pools of the device, at most

    def read(self, thread: LongThread) -> None:
        """Cache the thread."""
        self._ids = self._kept(thread)
        self.engine.extend(self.key())

    def key(self, asked: IntArray | None = None) -> ThreadKey:
        """Return the thread as the model sees it, with a question behind it."""
        return build_key(self._ids if asked is None else np.concatenate([self._ids, asked]), self.edits)

    def answer(self, asked: IntArray) -> Answer:
        """Decode an answer; afterwards what is cached is the bare thread again.

        Args:
            asked: the question, up to where the answer begins. Shape: (num_tokens,)
        """
        sampling = SamplingParams(max_tokens=MAX_ANSWER, stop_token_ids=self.renderer.stop_token_ids)
        ids: list[int] = []
        first, device = 0.0, self._inner.spec.device
        started = clock(device)
        key = self.key(asked)
        with closing(cast(Any, self.engine.generate(key, sampling))) as stream:
            for token in stream:
                first = first or clock(device)
                ids.append(token.id)
        self._watch()
        self.engine.purge(key, self._stays(key, asked))
        return Answer(
            text=self.renderer.decode(ids).strip(), ttft_ms=(first - started) * 1e3, tokens_refilled=self._refilled(key)
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        pool = self._inner.manager.pool
        return sum(x[:, :1].numel() * x.element_size() for x in (pool.k, pool.v))

    @property
    def device_bytes(self) -> int:
        """Bytes of keys and values on the device as answers were given, at most: pools in use and working cache."""
        return (self._held + self._runner.rows) * self.token_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of keys and values that were kept on the host then, at most."""
        return 0

    def _kept(self, thread: LongThread) -> IntArray:
        return thread.ids

    def _stays(self, key: ThreadKey, asked: IntArray) -> int:
        """Return how many entries of a key stay cached once it is answered."""
        return len(key) - len(asked)

    def _watch(self) -> None:
        """See how much is held now."""
        self._held = max(self._held, self._inner.tokens_in_use())

    def _refilled(self, key: ThreadKey) -> int:
        """Return how many tokens were brought back for the newest answer."""
        return 0


class EndsReader(Reader):
    """Holds the first and the newest tokens of a thread, at consecutive positions.

    Args:
        engine, renderer: as for `Reader`.
        first, newest: how many.
    """

    def __init__(self, engine: HFEngine, renderer: Renderer, *, first: int, newest: int) -> None:
        super().__init__(engine, renderer)
        self._first, self._newest = first, newest

    def _kept(self, thread: LongThread) -> IntArray:
        start = max(0, len(thread.ids) - self._newest)
        return np.concatenate([thread.ids[: min(self._first, start)], thread.ids[start:]])


class RetrievingReader(Reader):
    """Shows the first and the newest messages, and older ones that share words with the question (BM25).

    What stands behind the first message differs from question to question and is read again for each.

    Args:
        engine, renderer: as for `Reader`.
        budget: most tokens that are retrieved.
        newest: most tokens of the newest messages.
        longest: most tokens of a passage, see `passages`.
    """

    def __init__(self, engine: HFEngine, renderer: Renderer, *, budget: int, newest: int, longest: int) -> None:
        super().__init__(engine, renderer)
        self._budget, self._newest, self._longest = budget, newest, longest
        self._passages: list[IntArray] = []
        self._index: Any = None
        self._first, self._retrieved = 0, 0

    def read(self, thread: LongThread) -> None:
        """See the base class: the first message."""
        self._ids = self._kept(thread)
        if self._first:
            self.engine.extend(self.key().cut(self._first))

    def key(self, asked: IntArray | None = None) -> ThreadKey:
        """See the class."""
        chosen = [] if asked is None else self._chosen(asked)
        self._retrieved = sum(map(len, chosen))
        parts = [self._ids[: self._first], *chosen, self._ids[self._first :], *([] if asked is None else [asked])]
        return build_key(np.concatenate(parts), ())

    def _kept(self, thread: LongThread) -> IntArray:
        """Index the passages; return the messages that always stay."""
        ids, borders = thread.ids, thread.borders
        oldest = max(0, len(ids) - self._newest)
        start = int(next((border for border in borders if border >= oldest), oldest))
        self._first = int(next((border for border in borders if border <= start), 0))
        between = [self._first, *borders[(borders > self._first) & (borders < start)].tolist(), start]
        self._passages = passages(thread, between, self._longest)
        if self._passages:
            self._index = bm25s.BM25()
            self._index.index([self._words(passage) for passage in self._passages], show_progress=False)
        return np.concatenate([ids[: self._first], ids[start:]])

    def _chosen(self, asked: IntArray) -> list[IntArray]:
        """Return the best passages that fit the budget, in the order of the thread."""
        words = self._words(asked)
        if not (self._passages and words):
            return []
        scores, chosen, left = self._index.get_scores(words), [], self._budget
        for number in np.argsort(-scores, kind="stable"):
            if scores[number] > 0 and len(self._passages[number]) <= left:
                chosen.append(number)
                left -= len(self._passages[number])
        return [self._passages[number] for number in sorted(chosen)]

    def _words(self, ids: IntArray) -> list[str]:
        found = bm25s.tokenize(
            self.renderer.decode(ids.tolist()), stopwords="en", return_ids=False, show_progress=False
        )
        return list(found[0])

    def _stays(self, key: ThreadKey, asked: IntArray) -> int:
        return self._first

    def _refilled(self, key: ThreadKey) -> int:
        return self._retrieved


def passages(thread: LongThread, borders: Sequence[int], longest: int) -> list[IntArray]:
    """Cut a part of a thread into passages.

    A message is one, with its template. One that is longer is cut: each piece of its content has the message's
    template around it. Where a message is not to be told from others between two borders, tokens are cut as they come.

    Args:
        thread: the thread.
        borders: where messages begin, and where the last one ends; ascending.
        longest: most tokens of a passage.
    """
    ids, found = thread.ids, []
    for first, last in pairwise(borders):
        if last - first <= longest:
            found.append(ids[first:last])
            continue
        inside = [(start, end) for start, end in thread.contents if first <= start and end <= last]
        start, end = inside[0] if len(inside) == 1 else (first, last)
        before, after = ids[first:start], ids[end:last]
        step = max(1, longest - len(before) - len(after))
        found += [np.concatenate([before, ids[at : min(at + step, end)], after]) for at in range(start, end, step)]
    return found


class BiLayerReader(Reader):
    """Holds a thread in two layers.

    Args:
        engine: of its own, empty.
        renderer: of the model.
    """

    engine: BiLayerEngine

    def __init__(self, engine: BiLayerEngine, renderer: Renderer) -> None:
        super().__init__(engine.inner, renderer)
        self.engine = engine
        self._on_host = 0  # tokens in L2, at most

    @property
    def host_bytes(self) -> int:
        """See the base class: L2."""
        return self._on_host * self.token_bytes

    def _watch(self) -> None:
        windows = self.engine.windows
        landmarks = windows.manager.pages_in_use() * windows.pool.shape.num_landmarks
        self._held = max(self._held, self._inner.tokens_in_use() + landmarks)
        self._on_host = max(self._on_host, windows.manager.tokens_in_use())

    def _refilled(self, key: ThreadKey) -> int:
        store = self.engine.windows
        assert isinstance(store, CountingStore), "the engine is a CountingEngine"
        return store.refilled_tokens if self.engine.settings.moved(len(key)) else 0


class CountingStore(WindowStore):
    """Knows how many tokens were brought back last."""

    refilled_tokens = 0

    def refilled(self, parts: Parts, scores: torch.Tensor, budget: int) -> States:
        """Count them."""
        back = super().refilled(parts, scores, budget)
        self.refilled_tokens = len(back)
        return back


class CountingEngine(BiLayerEngine):
    """Its store counts."""

    store = CountingStore


class _WatchedRunner(ModelRunner):
    """Knows the longest working cache that it ran on."""

    rows = 0

    def forward(
        self, working: WorkingSet, ids: IntArray, positions: IntArray, rows: IntArray, **options: Any
    ) -> torch.Tensor | None:
        """Look at it."""
        logits = super().forward(working, ids, positions, rows, **options)
        self.rows = max(self.rows, working.length)
        return logits
