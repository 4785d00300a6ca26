"""Conformance suite of erasers: what holds for every one of them, on the real embedded engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ..cache.base import IntArray, ThreadKey
from ..cache.keys import KeyEdit, build_key
from ..engine.hf import HFEngine
from ..erasers.base import EditShape, Eraser
from ..types import EraseResult, Interval
from .models import tiny_model

SPANS: dict[str, list[Interval]] = {
    "middle": [(20, 27)],
    "one token": [(33, 34)],
    "start": [(0, 6)],
    "end": [(74, 80)],
    "several": [(5, 9), (30, 41), (60, 61)],
    "adjacent": [(16, 20), (20, 24), (24, 32)],
    "start and end": [(0, 3), (70, 80)],
}
"""Where spans may lie in a thread of 80 tokens."""


def thread_ids(num_tokens: int = 80, *, seed: int = 0) -> IntArray:
    """Return random token ids of the tiny models' vocabulary."""
    return np.random.default_rng(seed).integers(3, 211, num_tokens)


def keys_for(ids: IntArray, spans: Sequence[Interval], eraser: Eraser) -> tuple[ThreadKey, ThreadKey]:
    """Return the keys of a thread before and after its spans are erased."""
    edits = [
        KeyEdit(
            start=start, end=end, exact=eraser.exact, eraser_id=eraser.eraser_id,
            retraction_id=f"r{start}", closes_gap=eraser.closes_gap, shared=eraser.suffix_free,
        )
        for start, end in spans
    ]  # fmt: skip
    return build_key(ids, ()), build_key(ids, edits)


def erase(engine: HFEngine, ids: IntArray, spans: Sequence[Interval], eraser: Eraser) -> tuple[ThreadKey, EraseResult]:
    """Prefill a thread, erase the spans, and return the new key and the result."""
    old, new = keys_for(ids, spans, eraser)
    engine.extend(old)
    return new, engine.erase(old, spans, eraser, new)


class EraserConformance:
    """Subclass it and provide the fixture `eraser`."""

    @pytest.fixture
    def eraser(self) -> Eraser:
        """Return the eraser under test."""
        raise NotImplementedError("give the suite a fixture `eraser`")

    @pytest.fixture(params=[1, 4])
    def engine(self, request: pytest.FixtureRequest) -> HFEngine:
        """Return a real engine; both page sizes."""
        return HFEngine(tiny_model(), max_tokens=512, page_size=request.param, chunk_size=17)

    @pytest.mark.parametrize("where", SPANS)
    def test_new_key_is_cached_and_old_text_is_not(self, engine: HFEngine, eraser: Eraser, where: str) -> None:
        """The edit is found under the new key; the original text matches no further than the span."""
        spans, ids = SPANS[where], thread_ids()
        new, result = erase(engine, ids, spans, eraser)
        engine.check_integrity()
        page = engine.manager.pool.page_size
        assert engine.cached(new) >= len(new) // page * page - (page - 1)
        assert engine.cached(build_key(ids, ())) <= spans[0][0]
        assert result.tokens_erased == sum(end - start for start, end in spans)
        assert result.exact == eraser.exact
        assert result.edit_ms > 0

    @pytest.mark.parametrize("where", SPANS)
    def test_next_step_runs_on_the_edited_cache(self, engine: HFEngine, eraser: Eraser, where: str) -> None:
        """What follows an edit can be prefilled and gives finite logits, the same each time."""
        new, _ = erase(engine, thread_ids(), SPANS[where], eraser)
        more = thread_ids(9, seed=5)
        grown = ThreadKey(
            np.concatenate([new.ids, more]), np.concatenate([new.positions, new.next_position + np.arange(9)])
        )
        first = engine.extend(grown, num_last=3)
        again = engine.extend(grown, num_last=3)
        assert torch.isfinite(first.logits).all()
        torch.testing.assert_close(first.logits, again.logits, atol=1e-4, rtol=0)
        engine.check_integrity()

    def test_other_threads_are_untouched(self, engine: HFEngine, eraser: Eraser) -> None:
        """A fork that shares span and part of the suffix keeps its cache and its answer."""
        ids = thread_ids()
        other = build_key(np.concatenate([ids[:60], thread_ids(12, seed=9)]), ())
        before = engine.extend(other)
        stored = engine.read_kv(other, 0, 60)
        erase(engine, ids, [(20, 27), (50, 55)], eraser)
        after = engine.extend(other)
        assert after.num_cached_tokens >= before.num_prefilled_tokens - engine.manager.pool.page_size
        torch.testing.assert_close(before.logits, after.logits, atol=1e-4, rtol=0)
        for now, then in zip(engine.read_kv(other, 0, 60), stored, strict=True):
            assert torch.equal(now, then)

    def test_twice_gives_the_same_states(self, eraser: Eraser) -> None:
        """Deterministic: two engines end with the same KV."""
        states = []
        for _ in range(2):
            engine = HFEngine(tiny_model(), max_tokens=512)
            new, _ = erase(engine, thread_ids(), [(20, 27)], eraser)
            states.append(engine.read_kv(new, 0, engine.cached(new)))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    def test_a_second_edit_of_an_edited_thread(self, engine: HFEngine, eraser: Eraser) -> None:
        """Edits accumulate: a later retraction may lie before or after an earlier one."""
        ids, first, second = thread_ids(), (40, 44), (12, 20)
        new, _ = erase(engine, ids, [first], eraser)
        both = keys_for(ids, [second, first], eraser)[1]
        engine.erase(new, [second], eraser, both)
        engine.check_integrity()
        engine.extend(both)
        assert engine.cached(new) <= second[0]

    def test_cost_and_identity(self, eraser: Eraser) -> None:
        """The cost model is monotonic in the suffix; the id names the eraser and its hyper-parameters."""
        short = eraser.cost(EditShape(prefix=10, span=5, suffix=10))
        long = eraser.cost(EditShape(prefix=10, span=5, suffix=1000))
        assert 0 <= short.recomputed <= long.recomputed
        assert 0 <= short.moved <= long.moved
        assert eraser.eraser_id.startswith(eraser.name)
