"""The cost of an edit over lengths and depths: timings of real edits, ratios by hand."""

import json

import pytest

from kv_retract.errors import EraserMismatchError, UnknownNameError
from kv_retract.evals import latency as module
from kv_retract.evals.bench import BenchSettingError
from kv_retract.evals.latency import LatencyBench, bench_latency, growth
from kv_retract.evals.results import dump
from kv_retract.evals.specs import Spec

CONTEXTS, DEPTHS = (64, 256), (0.1, 0.5)


@pytest.fixture(scope="module")
def learned(make_eraser):
    return Spec("kveraser", {"path": str(make_eraser("kv_map"))})


@pytest.fixture(scope="module")
def document(learned):
    done = []
    found = bench_latency(
        LatencyBench(
            contexts=CONTEXTS, depths=DEPTHS, span=8, arms=(Spec("shift"), learned), model="random", repeats=1
        ),
        progress=lambda *step: done.append(step),
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    return found


def test_every_arm_at_every_place(document, learned):
    places = [(context, depth) for context in CONTEXTS for depth in DEPTHS]
    arms = ["shift", 'kveraser:variant="kv_map"', "recompute"]
    rows = document["rows"]
    assert [(r["context"], r["depth"], r["arm"]) for r in rows] == [(*p, arm) for p in places for arm in arms]
    assert all(row["edit_ms_low"] <= row["edit_ms"] <= row["edit_ms_high"] and row["floor_ms"] >= 0 for row in rows)


def test_speedups_are_over_recompute_at_the_same_place(document):
    cost = {(r["context"], r["depth"], r["arm"]): r["edit_ms"] for r in document["rows"]}
    for row in document["rows"]:
        expected = cost[row["context"], row["depth"], "recompute"] / row["edit_ms"]
        assert row["speedup"] == pytest.approx(expected)
        assert (row["arm"] == "recompute") <= (row["speedup"] == 1.0)


def test_growth_is_longest_over_shortest(document, learned):
    cost = {(r["context"], r["depth"], r["arm"]): r["edit_ms"] for r in document["rows"]}
    found = {(g["arm"], g["depth"]): g["growth"] for g in document["growth"]}
    assert len(document["growth"]) == len(found) == 6
    for (arm, depth), value in found.items():
        assert value == pytest.approx(cost[256, depth, arm] / cost[64, depth, arm])


def test_growth_by_hand():
    def row(arm, depth, context, edit_ms):
        return {"arm": arm, "depth": depth, "context": context, "edit_ms": edit_ms}

    rows = [
        row("a", 0.1, 4096, 3.0), row("a", 0.1, 1024, 2.0), row("a", 0.1, 16_384, 8.0),  # in any order
        row("a", 0.5, 4096, 3.0), row("a", 0.5, 1024, 4.0), row("a", 0.5, 16_384, 2.0),
        row("b", 0.1, 1024, 5.0), row("b", 0.1, 16_384, 5.0),
    ]  # fmt: skip
    assert growth(rows) == [
        {"arm": "a", "depth": 0.1, "growth": 4.0}, {"arm": "a", "depth": 0.5, "growth": 0.5},
        {"arm": "b", "depth": 0.1, "growth": 1.0},
    ]  # fmt: skip


def test_one_length_does_not_grow():
    found = bench_latency(
        LatencyBench(contexts=(64,), depths=(0.5,), span=8, arms=(Spec("none"),), model="random", repeats=1)
    )
    assert {row["growth"] for row in found["growth"]} == {1.0}


def test_the_document_says_what_was_measured(document):
    assert json.loads(dump(document)) == json.loads(json.dumps(document))
    assert (document["span"], document["model"], document["dtype"], document["repeats"]) == (8, "random", "float32", 1)
    assert document["machine"]["device"] == "cpu" and document["versions"]["torch"]
    assert document["num_parameters"] > 1e6 and document["started_at"].endswith("+00:00")


def test_settings_reach_every_benchmark(monkeypatch, document):
    seen, real = [], module.bench_edit
    monkeypatch.setattr(module, "bench_edit", lambda settings, **kw: seen.append(settings) or real(settings, **kw))
    bench_latency(
        LatencyBench(
            contexts=(80, 64), depths=(0.25,), span=4, arms=(Spec("mask"),), model="random", repeats=2, seed=7,
            dtype="bfloat16",
        )
    )  # fmt: skip
    assert [(s.context, s.depth, s.span, s.repeats, s.seed, s.dtype, s.model) for s in seen] == [
        (context, 0.25, 4, 2, 7, "bfloat16", "random") for context in (80, 64)
    ]


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"span": 100}, BenchSettingError, "pass a smaller --span or --depth"),
        ({"contexts": (40_000,)}, BenchSettingError, "32768 positions.*pass a smaller --context"),
        ({"depths": (1.5,)}, BenchSettingError, "expected a depth from 0 to 1, got 1.5"),
        ({"arms": (Spec("nope"),)}, UnknownNameError, "unknown eraser 'nope'"),
        ({"model": "nope"}, UnknownNameError, "a registered model"),
        ({"arms": (Spec("kveraser", {"path": "nowhere"}),)}, EraserMismatchError, "kv-retract train eraser"),
    ],
)
def test_settings_that_cannot_be(settings, error, told):
    fields = {"contexts": (64,), "span": 8, "model": "random", "repeats": 1, "arms": (Spec("mask"),), **settings}
    with pytest.raises(error, match=told):
        bench_latency(LatencyBench(**fields))


def test_an_eraser_of_another_model_is_refused(make_eraser, learnt_model):
    arm = Spec("kveraser", {"path": str(make_eraser("suffix_aware", learnt_model))})
    with pytest.raises(EraserMismatchError, match="kv-retract train eraser --model DIR"):
        bench_latency(LatencyBench(contexts=(64,), span=8, arms=(arm,), model="random", repeats=1))


def test_a_length_that_does_not_fit_is_told_before_any_work():
    settings = LatencyBench(contexts=(64, 40_000), span=8, arms=(Spec("mask"),), model="random", repeats=1)
    done = []
    with pytest.raises(BenchSettingError, match="32768 positions"):
        bench_latency(settings, progress=lambda *step: done.append(step))
    assert not done


def test_the_default_arms_are_the_variants_and_what_they_replace():
    assert [arm.label for arm in LatencyBench().arms] == [
        "recompute", "shift", "repair",
        *(f'kveraser:variant="{variant}"' for variant in ("blind", "suffix_aware", "kv_map")),
    ]  # fmt: skip
