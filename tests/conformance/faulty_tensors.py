"""Erasers and engines that break their contract on purpose, for `test_the_kit_finds_faults.py`.

The name of the file keeps it out of an ordinary run of the tests.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kv_retract.cache.base import ThreadKey
from kv_retract.engine.hf import HFEngine
from kv_retract.erasers import EditCost, MaskEraser
from kv_retract.testing.engines import EngineConformance
from kv_retract.testing.erasers import EraserConformance

# -- erasers ----------------------------------------------------------------------------------------------------------


class EraserThatDrawsLots(MaskEraser):
    draws = itertools.count()

    def erase(self, view):
        super().erase(view)
        if len(followers := view.followers):
            k, v = view.read(followers)
            view.write(followers, k, v + next(self.draws))


class EraserThatLiesAboutItsGap(MaskEraser):
    closes_gap = True


class EraserWhoseCostFalls(MaskEraser):
    def cost(self, shape):
        return EditCost(moved=10_000 - shape.suffix)


class OfEraser(EraserConformance):
    type = MaskEraser

    @pytest.fixture
    def eraser(self):
        return self.type()


class TestEraserThatDrawsLots(OfEraser):
    type = EraserThatDrawsLots


class TestEraserThatLiesAboutItsGap(OfEraser):
    type = EraserThatLiesAboutItsGap


class TestEraserWhoseCostFalls(OfEraser):
    type = EraserWhoseCostFalls


# -- engines ----------------------------------------------------------------------------------------------------------


class EngineThatCountsPositions(HFEngine):
    def extend(self, key, *, num_last=1):
        return super().extend(ThreadKey(key.ids, np.arange(len(key)), key.extra_key), num_last=num_last)


class EngineThatFeedsTombstones(HFEngine):
    def extend(self, key, *, num_last=1):
        fed = np.where(key.ids < 0, 3, key.ids) if self.cached(key) < len(key) - num_last else key.ids
        return super().extend(ThreadKey(fed, key.positions, key.extra_key), num_last=num_last)


class EngineThatKeepsTheText(HFEngine):
    def erase(self, key, spans, eraser, new_key):
        result = super().erase(key, spans, eraser, new_key)
        self.extend(key)
        return result


class Commits:
    """Swallows what an eraser raises, so that its half of an edit is committed."""

    def __init__(self, eraser):
        self.eraser, self.error = eraser, None
        self.exact, self.eraser_id = eraser.exact, eraser.eraser_id

    def erase(self, view):
        try:
            self.eraser.erase(view)
        except Exception as error:
            self.error = error


class EngineThatCommitsHalfEdits(HFEngine):
    def erase(self, key, spans, eraser, new_key):
        committing = Commits(eraser)
        result = super().erase(key, spans, committing, new_key)
        if committing.error:
            raise committing.error
        return result


class EngineThatServesWhatFailedEditsWrote(HFEngine):
    def erase(self, key, spans, eraser, new_key):
        class Wrapped(Commits):
            def erase(self, view):
                super().erase(view)
                if self.error:
                    view._path._written_from = 10**9  # the abort takes this path for untouched
                    raise self.error

        return super().erase(key, spans, Wrapped(eraser), new_key)


class EngineThatWritesWhatOthersShare(HFEngine):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.manager.index.exclusive_from = lambda *args, **kwargs: 0


class EngineThatLeaksStreams(HFEngine):
    def generate(self, key, sampling, *, logits_processor=None):
        yield from super().generate(key, sampling, logits_processor=logits_processor)
        self.manager.lease(key.ids)


class EngineThatLeaksOnRefusal(HFEngine):
    def extend(self, key, *, num_last=1):
        try:
            return super().extend(key, num_last=num_last)
        except Exception:
            self.manager.append(self.manager.lease(key.ids[:0]), np.arange(3))
            raise


class EngineThatDeniesItsCache(HFEngine):
    def cached(self, key):
        return 0


class EngineThatSwapsKeysAndValues(HFEngine):
    def read_kv(self, key, start, end):
        return super().read_kv(key, start, end)[::-1]


class EngineThatDropsFromTheStart(HFEngine):
    def drop(self, key, start):
        return super().drop(key, 0)


class EngineThatRoundsLogits(HFEngine):
    def extend(self, key, *, num_last=1):
        result = super().extend(key, num_last=num_last)
        return replace(result, logits=result.logits.to(torch.bfloat16).float())


class EngineThatIgnoresProcessors(HFEngine):
    def generate(self, key, sampling, *, logits_processor=None):
        return super().generate(key, sampling)


class EngineThatPrefillsHalf(HFEngine):
    def prefill(self, key):
        return super().prefill(key.cut(max(1, len(key) // 2)))


class EngineThatSeesNoDifference(HFEngine):
    def divergence(self, exact, steered, num_last):
        return super().divergence(exact, exact, num_last)


class OfEngine(EngineConformance):
    type = HFEngine

    @pytest.fixture
    def make_engine(self):
        return lambda model: self.type(model, max_tokens=1024)


class TestEngineThatCountsPositions(OfEngine):
    type = EngineThatCountsPositions


class TestEngineThatFeedsTombstones(OfEngine):
    type = EngineThatFeedsTombstones


class TestEngineThatKeepsTheText(OfEngine):
    type = EngineThatKeepsTheText


class TestEngineThatCommitsHalfEdits(OfEngine):
    type = EngineThatCommitsHalfEdits


class TestEngineThatServesWhatFailedEditsWrote(OfEngine):
    type = EngineThatServesWhatFailedEditsWrote


class TestEngineThatWritesWhatOthersShare(OfEngine):
    type = EngineThatWritesWhatOthersShare


class TestEngineThatLeaksStreams(OfEngine):
    type = EngineThatLeaksStreams


class TestEngineThatLeaksOnRefusal(OfEngine):
    type = EngineThatLeaksOnRefusal


class TestEngineThatDeniesItsCache(OfEngine):
    type = EngineThatDeniesItsCache


class TestEngineThatSwapsKeysAndValues(OfEngine):
    type = EngineThatSwapsKeysAndValues


class TestEngineThatDropsFromTheStart(OfEngine):
    type = EngineThatDropsFromTheStart


class TestEngineThatRoundsLogits(OfEngine):
    type = EngineThatRoundsLogits


class TestEngineThatIgnoresProcessors(OfEngine):
    type = EngineThatIgnoresProcessors


class TestEngineThatPrefillsHalf(OfEngine):
    type = EngineThatPrefillsHalf


class TestEngineThatSeesNoDifference(OfEngine):
    type = EngineThatSeesNoDifference
