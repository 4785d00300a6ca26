"""The edits of an engine: what is retracted is gone, what others use stays, and no edit is ever half done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ..cache.base import EditView, IntArray
from ..cache.keys import KeyEdit, build_key
from ..engine.base import LocalEngine
from ..erasers.base import EditCost, EditShape, Eraser
from ..erasers.mask import MaskEraser
from ..erasers.recompute import RecomputeEraser
from ..errors import SpanError
from ..types import Interval, SamplingParams
from .engine_fixtures import EngineFixtures, Settle, key_of
from .erasers import keys_for
from .plain import plain_answer, plain_logits

SPANS: dict[str, list[Interval]] = {
    "middle": [(20, 27)],
    "start": [(0, 6)],
    "several": [(5, 9), (30, 41), (60, 61)],
}
"""Where spans lie in a thread of 80 tokens."""

Ids = Callable[..., IntArray]


class HalfwayError(Exception):
    """What `HalfwayEraser` raises."""


@dataclass(kw_only=True)
class HalfwayEraser(Eraser):
    """Deliberately wrong: fails after some of its steps, where the contract says "before the first write"."""

    name = "halfway"

    steps: int
    """How many of: hide a span, overwrite a few states, move what follows, recompute a few tokens."""

    def cost(self, shape: EditShape) -> EditCost:
        """Free."""
        return EditCost()

    def erase(self, view: EditView) -> None:
        """Do the first steps, then raise HalfwayError."""
        few = view.followers[1:4]
        for step in (self._hide, self._write, self._move, self._recompute)[: self.steps]:
            step(view, few)
        raise HalfwayError(f"failed after {self.steps} steps")

    def _hide(self, view: EditView, few: IntArray) -> None:
        view.hide(*view.spans[0])

    def _write(self, view: EditView, few: IntArray) -> None:
        k, v = view.read(few)
        view.write(few, k * 2, v + 1)

    def _move(self, view: EditView, few: IntArray) -> None:
        view.move(view.followers, np.full(len(view.followers), 3))

    def _recompute(self, view: EditView, few: IntArray) -> None:
        view.recompute(few)


@dataclass(kw_only=True)
class HalfwayRebuild(HalfwayEraser):
    """Deliberately wrong: asks for a rebuild and fails."""

    name = "halfway_rebuild"
    exact = True
    closes_gap = True

    def erase(self, view: EditView) -> None:
        """Ask, then raise HalfwayError."""
        view.rebuild()
        raise HalfwayError("failed after the rebuild was asked for")


FAILING = [*(HalfwayEraser(steps=steps) for steps in range(5)), HalfwayRebuild(steps=0)]
"""Erasers that fail at every step of an edit."""


def without(ids: IntArray, spans: Sequence[Interval]) -> IntArray:
    """Return the ids outside of the spans."""
    return np.delete(ids, np.concatenate([np.arange(start, end) for start, end in spans]))


class EngineEdits(EngineFixtures):
    """Part of `EngineConformance`."""

    # -- tombstones -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("prefilled", [0, 5, 40])
    def test_a_cold_tombstone_is_refused(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle, prefilled: int
    ) -> None:
        """SpanError from `extend` and at the first `next` of `generate`, whatever of the text is cached."""
        plain, tombs = keys_for(ids(40), [(20, 27)], MaskEraser())
        if prefilled:
            engine.extend(key_of(ids(40)[:prefilled]))
        in_use = engine.tokens_in_use()
        for num_last in (1, 5):
            with pytest.raises(SpanError):
                engine.extend(tombs, num_last=num_last)
        with pytest.raises(SpanError):
            next(engine.generate(tombs, SamplingParams(max_tokens=3)))
        engine.check_integrity()
        assert engine.tokens_in_use() == in_use, "a refused thread holds slots"
        assert engine.cached(tombs) <= min(20, prefilled)
        self.assert_close(engine.extend(plain).logits, plain_logits(model, plain.ids))
        settle(plain, tombs)

    # -- what an edit does ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("where", SPANS)
    def test_a_recompute_edit_equals_a_prefill_without_the_spans(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle, where: str
    ) -> None:
        """The text leaves the cache and the answer, now and in the steps that follow."""
        spans, eraser = SPANS[where], RecomputeEraser()
        old, new = keys_for(ids(80), spans, eraser)
        engine.extend(old)
        result = engine.erase(old, spans, eraser, new)
        engine.check_integrity()
        assert result.exact and result.eraser_id == eraser.eraser_id
        assert result.tokens_erased == (sum(end - start for start, end in spans) if self.caches else 0)
        assert engine.cached(old) <= spans[0][0], "the retracted text is still cached"
        left = without(ids(80), spans)
        assert engine.cached(new) == self.kept(len(left), page_size)
        self.assert_close(engine.extend(new, num_last=9).logits, plain_logits(model, left, num_last=9))
        grown = np.append(left, ids(20, 1))
        assert engine.extend(key_of(grown)).num_cached_tokens == self.kept(len(left), page_size)
        got = [token.id for token in engine.generate(key_of(grown), SamplingParams(max_tokens=4))]
        assert got == plain_answer(model, grown, 4)
        settle(old, new, key_of(grown, np.array(got)))

    def test_a_prefill_brings_a_key_into_the_cache_and_says_what_it_took(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """Also in parts, as a heal does it; a tombstone is refused there too."""
        key = key_of(ids(120))
        tokens = engine.prefill(key.cut(50)) + engine.prefill(key)
        assert engine.cached(key) == self.kept(120, page_size)
        if self.caches:
            assert 120 <= tokens <= 120 + page_size
        self.assert_close(engine.extend(key).logits, plain_logits(model, key.ids))
        with pytest.raises(SpanError):
            engine.prefill(build_key(ids(40, 1), [KeyEdit(start=10, end=20, exact=False, retraction_id="r")]))
        settle(key)

    def test_the_divergence_of_two_caches_is_that_of_their_distributions(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """None of a key from itself; of an edited path, what plain transformers gives with the span hidden."""
        self.needs_cache()
        tokens, span, eraser = ids(90), (20, 40), MaskEraser()
        edit = KeyEdit(start=20, end=40, exact=False, eraser_id=eraser.eraser_id, retraction_id="r")
        exact, steered = key_of(without(tokens, [span])), build_key(tokens, [edit])
        engine.extend(key_of(tokens[:80]))
        engine.erase(key_of(tokens[:80]), [span], eraser, steered.cut(80))
        engine.extend(exact)
        engine.extend(steered)
        same = engine.divergence(exact, exact, 3)
        assert same is not None and same.kl < 1e-6 and same.top1 == 1.0 and same.positions == 3
        found = engine.divergence(exact, steered, 3)
        want = plain_logits(model, exact.ids, num_last=3).log_softmax(-1)
        got = plain_logits(model, tokens, num_last=3, hidden=[span], hidden_from=80).log_softmax(-1)
        kl = float((want.exp() * (want - got)).sum(-1).mean())
        assert found is not None and kl > 1e-6
        assert abs(found.kl - kl) < 0.01 * kl + 1e-6
        settle(exact, steered, key_of(tokens))

    @pytest.mark.parametrize("where", SPANS)
    def test_hidden_spans_are_invisible_to_what_follows(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle, where: str
    ) -> None:
        """Equal to plain transformers with an attention mask; positions stay, tombstones are found, cold text is not.

        The spans' neighbors have read them and keep that: the approximation of `mask`, and no concern of the engine.
        """
        self.needs_cache()
        spans, eraser, more = SPANS[where], MaskEraser(), ids(20, 1)
        old, new = keys_for(ids(80), spans, eraser)
        engine.extend(old)
        result = engine.erase(old, spans, eraser, new)
        engine.check_integrity()
        assert result.tokens_erased == sum(end - start for start, end in spans) and not result.exact
        assert engine.cached(new) == self.kept(80, page_size)
        assert engine.cached(old) <= spans[0][0]
        grown = build_key(np.append(ids(80), more), ())
        grown.ids[:80] = new.ids
        expected = plain_logits(model, np.append(ids(80), more), num_last=5, hidden=spans, hidden_from=80)
        for _ in range(2):
            self.assert_close(engine.extend(grown, num_last=5).logits, expected)
        hidden = sum(end - start for start, end in spans)
        assert engine.read_kv(new, 0, 64)[0].shape[1] == 64 - hidden, "hidden entries have no states to read"
        settle(old, new, grown)

    def test_an_edit_leaves_other_threads_alone(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """A fork that shares the span keeps its states bit by bit; a running stream keeps its answer."""
        spans, eraser = SPANS["middle"], MaskEraser()
        fork = key_of(ids(80)[:60], ids(12, 1))
        old, new = keys_for(ids(80), spans, eraser)
        answer = plain_answer(model, old.ids, 6)
        engine.extend(fork)
        before = self.states(engine, fork.ids)
        stream = engine.generate(old, SamplingParams(max_tokens=6))
        got = [next(stream).id, next(stream).id]
        engine.erase(old, spans, eraser, new)
        engine.check_integrity()
        got += [token.id for token in stream]
        assert got == answer
        after = self.states(engine, fork.ids)
        assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        self.assert_close(engine.extend(fork).logits, plain_logits(model, fork.ids))
        settle(old, new, fork, key_of(old.ids, np.array(answer)))

    def test_two_threads_make_the_same_edit(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """The second finds the first one's key; nothing is lost between them, and the text is gone again."""
        spans, eraser = SPANS["middle"], RecomputeEraser()
        old, new = keys_for(ids(80), spans, eraser)
        for _ in range(2):
            engine.extend(old)
            engine.erase(old, spans, eraser, new)
            engine.check_integrity()
            assert engine.cached(old) <= 20
            assert engine.cached(new) == self.kept(73, page_size)
        self.assert_close(engine.extend(new).logits, plain_logits(model, new.ids))
        settle(old, new)

    # -- edits of what is not wholly cached -------------------------------------------------------------------------

    @pytest.mark.parametrize("eraser", [RecomputeEraser(), MaskEraser()], ids=lambda eraser: eraser.name)
    def test_nothing_is_erased_where_nothing_is_cached(
        self, engine: LocalEngine, ids: Ids, settle: Settle, eraser: Eraser
    ) -> None:
        """An edit prefills nothing by itself."""
        old, new = keys_for(ids(80), SPANS["middle"], eraser)
        result = engine.erase(old, SPANS["middle"], eraser, new)
        assert (result.tokens_erased, result.tokens_recomputed, engine.cached(old), engine.cached(new)) == (0, 0, 0, 0)
        settle(old, new)

    def test_spans_past_what_is_cached_are_ignored(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """The edit covers the others, and the tombstones of the ignored ones are cold."""
        self.needs_cache()
        eraser, spans = MaskEraser(), [(20, 27), (60, 66)]
        old, new = keys_for(ids(80), spans, eraser)
        engine.extend(key_of(ids(80)[:48]))
        result = engine.erase(old, spans, eraser, new)
        assert result.tokens_erased == 7
        assert engine.cached(new) == self.kept(48, page_size)
        with pytest.raises(SpanError):
            engine.extend(new)
        settle(old, new)

    def test_a_span_that_is_cached_in_part_is_gone_after_the_edit(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """No token of it is left, and the thread answers as one without it."""
        spans, eraser = [(35, 55)], RecomputeEraser()
        old, new = keys_for(ids(80), spans, eraser)
        engine.extend(key_of(ids(80)[:48]))
        engine.erase(old, spans, eraser, new)
        engine.check_integrity()
        assert engine.cached(old) <= 35
        self.assert_close(engine.extend(new).logits, plain_logits(model, without(ids(80), spans)))
        settle(old, new)

    def test_an_edit_ends_before_a_span_that_is_cached_in_part(
        self, engine: LocalEngine, model: Any, page_size: int, ids: Ids, settle: Settle
    ) -> None:
        """The whole ones before it are erased, and what follows them up to it stays cached."""
        self.needs_cache()
        spans, eraser = [(10, 17), (39, 55)], MaskEraser()
        old, new = keys_for(ids(80), spans, eraser)
        engine.extend(key_of(ids(80)[:48]))
        result = engine.erase(old, spans, eraser, new)
        engine.check_integrity()
        assert result.tokens_erased == 7
        assert engine.cached(new) == self.kept(39, page_size)
        assert engine.cached(old) <= 10
        settle(old, new)

    # -- edits that fail --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
    @pytest.mark.parametrize("eraser", FAILING, ids=lambda eraser: eraser.eraser_id)
    def test_an_eraser_that_fails_leaves_no_half_edit(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle, eraser: Eraser, shared: bool
    ) -> None:
        """The old path is intact or uncached, the new key is not cached, and all threads answer as before."""
        self.needs_cache()
        spans, threads = SPANS["middle"], [ids(80)]
        if shared:
            threads.append(np.append(ids(80)[:60], ids(12, 1)))
        old, new = keys_for(ids(80), spans, eraser)
        for thread in threads:
            engine.extend(key_of(thread))
        before = [self.states(engine, thread) for thread in threads]
        with pytest.raises(HalfwayError):
            engine.erase(old, spans, eraser, new)
        engine.check_integrity()
        assert engine.cached(new) <= spans[0][0], "the edit that failed is found under its key"
        for number, thread in enumerate(threads):
            after = self.states(engine, thread)
            for now, then in zip(after, before[number], strict=True):
                assert torch.equal(now, then[:, : now.shape[1]]), "a state that the eraser wrote is still served"
            if number:
                assert after[0].shape == before[number][0].shape, "the fork lost what it shares"
            self.assert_close(engine.extend(key_of(thread)).logits, plain_logits(model, thread))
        settle(old, new, *(key_of(thread) for thread in threads))

    def test_an_edit_succeeds_after_one_that_failed(
        self, engine: LocalEngine, model: Any, ids: Ids, settle: Settle
    ) -> None:
        """Nothing of the failure is in its way."""
        self.needs_cache()
        spans, eraser = SPANS["middle"], RecomputeEraser()
        old, new = keys_for(ids(80), spans, eraser)
        engine.extend(old)
        failing = HalfwayEraser(steps=4)
        with pytest.raises(HalfwayError):
            engine.erase(old, spans, failing, keys_for(ids(80), spans, failing)[1])
        engine.extend(old)
        engine.erase(old, spans, eraser, new)
        assert engine.cached(old) <= spans[0][0]
        self.assert_close(engine.extend(new).logits, plain_logits(model, without(ids(80), spans)))
        settle(old, new)

    def states(self, engine: LocalEngine, ids: IntArray) -> tuple[torch.Tensor, ...]:
        """Return K and V of all that is cached of a thread."""
        key = key_of(ids)
        return engine.read_kv(key, 0, engine.cached(key)) if self.caches else ()
