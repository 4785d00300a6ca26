"""One bad document under many threads: who pays for the edit, on real edits of random token ids."""

import json

import pytest

from kv_retract.engine.hf import HFEngine
from kv_retract.errors import EraserMismatchError, UnknownNameError
from kv_retract.evals import shared as module
from kv_retract.evals.results import dump
from kv_retract.evals.shared import SharedBench, bench_shared
from kv_retract.evals.specs import Spec

THREADS, PREFIX, SPAN, SUFFIX = 5, 32, 12, 20
SIZES = {"threads": THREADS, "prefix": PREFIX, "span": SPAN, "suffix": SUFFIX, "model": "random"}
VARIANTS = ("blind", "suffix_aware", "kv_map")


@pytest.fixture(scope="module")
def learned(make_eraser):
    return {variant: Spec("kveraser", {"path": str(make_eraser(variant))}) for variant in VARIANTS}


@pytest.fixture(scope="module")
def found(learned):
    """The document, and each arm's engine as it was left, with what every call of `erase` returned."""
    engines, ticks = [], []

    class Watched(HFEngine):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            self.results, self.checked, self.before = [], 0, None
            engines.append(self)

        def erase(self, *args):
            self.before = self.before or self.tokens_in_use()
            self.results.append(super().erase(*args))
            return self.results[-1]

        def check_integrity(self):
            self.checked += 1
            super().check_integrity()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kv_retract.engine.hf.HFEngine", Watched)
        document = bench_shared(
            SharedBench(**SIZES, arms=(*learned.values(), Spec("recompute"), Spec("mask"))),
            progress=lambda *step: ticks.append(step),
        )
    assert ticks == [(i, 5 * THREADS) for i in range(1, 5 * THREADS + 1)]
    return document, dict(zip(document["arms"], engines, strict=True))


@pytest.mark.parametrize("variant", ["blind", "kv_map"])
def test_the_first_thread_pays_and_the_others_share(found, learned, variant):
    arm = found[0]["arms"][f'kveraser:variant="{variant}"']
    assert (arm["tokens_written_first"], arm["tokens_written_all"]) == (SPAN, SPAN)
    written = [r.tokens_recomputed + r.tokens_moved for r in found[1][f'kveraser:variant="{variant}"'].results]
    assert written == [SPAN] + [0] * (THREADS - 1)


def test_every_thread_pays_where_the_suffix_matters(found, learned):
    arm = found[0]["arms"]['kveraser:variant="suffix_aware"']
    assert (arm["tokens_written_first"], arm["tokens_written_all"]) == (SPAN, THREADS * SPAN)


def test_recomputation_is_paid_by_every_thread(found):
    arm = found[0]["arms"]["recompute"]
    assert (arm["tokens_written_first"], arm["tokens_written_all"]) == (SUFFIX, THREADS * SUFFIX)
    assert found[0]["arms"]["mask"]["tokens_written_all"] == 0


def test_slots_in_use(found, learned):
    """Before: one document. After: a shared edit holds it once, one per thread as often as there are threads."""
    arms, engines = found[0]["arms"], found[1]
    suffixes = THREADS * SUFFIX
    assert {engine.before for engine in engines.values()} == {PREFIX + SPAN + suffixes}
    for variant in ("blind", "kv_map"):
        assert arms[f'kveraser:variant="{variant}"']["tokens_in_use"] == PREFIX + SPAN + suffixes
    assert arms['kveraser:variant="suffix_aware"']["tokens_in_use"] == PREFIX + THREADS * SPAN + suffixes
    assert arms["recompute"]["tokens_in_use"] == arms["mask"]["tokens_in_use"] == PREFIX + suffixes
    for label, engine in engines.items():
        assert engine.tokens_in_use() == arms[label]["tokens_in_use"]


def test_the_cache_is_whole_afterwards(found):
    for engine in found[1].values():
        assert engine.checked == 1 and len(engine.results) == THREADS
        assert {result.tokens_erased for result in engine.results} == {SPAN}
        engine.check_integrity()


def test_times(monkeypatch, found):
    """By a scripted clock: the first edit takes 100 ms, the others 1, 2, 3 and 40."""
    readings = iter([*(t / 1e3 for t in (0, 100, 200, 201, 300, 302, 400, 403, 500, 540))])
    monkeypatch.setattr(module, "clock", lambda device: next(readings))
    (arm,) = bench_shared(SharedBench(**SIZES, arms=(Spec("mask"),)))["arms"].values()
    times = [arm[name] for name in ("first_ms", "next_ms_median", "all_ms")]
    assert times == pytest.approx([100, 2.5, 146])
    for label, arm in found[0]["arms"].items():
        inner = sum(result.edit_ms for result in found[1][label].results)
        assert arm["all_ms"] >= 0.9 * inner > 0, "the real clock is outside of the engine"


def test_the_document_says_what_was_measured(found):
    document, _ = found
    assert {name: document[name] for name in SIZES} == SIZES and document["seed"] == 0
    assert json.loads(dump(document)) == json.loads(json.dumps(document))
    assert document["machine"]["device"] == "cpu" and document["versions"]["torch"]
    assert set(document["arms"]["mask"]) == {
        "first_ms", "next_ms_median", "all_ms", "tokens_written_first", "tokens_written_all", "tokens_in_use"
    }  # fmt: skip


def test_threads_of_the_same_seed_are_the_same(monkeypatch):
    seen = []

    class Watched(HFEngine):
        def extend(self, key, **kw):
            seen.append(key.ids.tolist())
            return super().extend(key, **kw)

    monkeypatch.setattr("kv_retract.engine.hf.HFEngine", Watched)
    for seed in (0, 0, 1):
        bench_shared(SharedBench(**SIZES, arms=(Spec("mask"),), seed=seed))
    first, again, other = (seen[i : i + THREADS] for i in range(0, 3 * THREADS, THREADS))
    assert first == again != other and len(seen) == 3 * THREADS
    assert len({tuple(ids[: PREFIX + SPAN]) for ids in first}) == 1 and len({tuple(ids) for ids in first}) == THREADS
    assert {len(ids) for ids in first} == {PREFIX + SPAN + SUFFIX}


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"arms": (Spec("nope"),)}, UnknownNameError, "unknown eraser 'nope'"),
        ({"model": "nope"}, UnknownNameError, "a registered model"),
        ({"arms": (Spec("kveraser", {"path": "nowhere"}),)}, EraserMismatchError, "kv-retract train eraser"),
    ],
)
def test_parts_that_do_not_exist(settings, error, told):
    with pytest.raises(error, match=told):
        bench_shared(SharedBench(**{**SIZES, **settings}))


def test_an_eraser_of_another_model_is_refused(make_eraser, learnt_model):
    arm = Spec("kveraser", {"path": str(make_eraser("kv_map", learnt_model))})
    with pytest.raises(EraserMismatchError, match="kv-retract train eraser --model DIR"):
        bench_shared(SharedBench(**SIZES, arms=(arm,)))


def test_threads_that_do_not_fit_into_the_model():
    from kv_retract.evals.bench import BenchSettingError

    with pytest.raises(BenchSettingError, match="32768 positions"):
        bench_shared(SharedBench(**{**SIZES, "prefix": 40_000}, arms=(Spec("mask"),)))


def test_unknown_erasers_are_told_before_any_work():
    done = []
    with pytest.raises(UnknownNameError):
        bench_shared(SharedBench(**SIZES, arms=(Spec("mask"), Spec("nope"))), progress=lambda *step: done.append(step))
    assert not done


def test_the_default_arms_are_the_variants_and_recompute():
    assert [arm.label for arm in SharedBench().arms] == [
        'kveraser:variant="blind"', 'kveraser:variant="kv_map"', 'kveraser:variant="suffix_aware"', "recompute"
    ]  # fmt: skip
    assert SharedBench().threads == 64
