"""The benchmark of healing, on a small scale: what it tells is measured, and the cache is empty behind it."""

import pytest

from kv_retract.errors import UnknownNameError
from kv_retract.evals import heal as module
from kv_retract.evals.bench import BenchSettingError
from kv_retract.evals.heal import ARMS, HealBench, bench_heal
from kv_retract.evals.results import dump

SMALL = {"contexts": (256,), "overhead_context": 256, "repeats": 2, "model": "random", "eraser": "mask"}


@pytest.fixture(scope="module")
def found():
    ticks, engines = [], []

    class Watched(module_engine()):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            engines.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kv_retract.engine.hf.HFEngine", Watched)
        document = bench_heal(HealBench(**SMALL), progress=lambda *step: ticks.append(step))
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    return document, engines


def module_engine():
    from kv_retract.engine.hf import HFEngine

    return HFEngine


def test_every_arm_is_timed_and_healing_is_exact(found):
    [row] = found[0]["rows"]
    assert set(row["first_token_ms"]) == set(ARMS) and all(ms > 0 for ms in row["first_token_ms"].values())
    assert row["ratio"]["off"] == 1.0
    assert row["healed_ms"] > 0 and row["healed_tokens"] > 50
    assert row["kl_steered"] > 1e-5 > row["kl_healed_max"]
    assert row["top1_healed_min"] == 1.0


def test_the_overhead_is_that_of_pairs(found):
    cost = found[0]["overhead"]
    assert cost["n"] == 2 * SMALL["repeats"] and cost["tokens"] > 250 and len(cost["policies"]) == 8
    assert cost["session_ms"] > 0 and cost["bare_ms"] > 0
    dump(found[0])


def test_the_document_names_machine_and_settings(found):
    assert found[0]["model"] == "random" and found[0]["machine"]["threads"] >= 1
    assert found[0]["num_parameters"] > 0


def test_threads_that_do_not_fit_are_refused():
    with pytest.raises(BenchSettingError, match="positions"):
        bench_heal(HealBench(contexts=(100_000,), model="random"))


def test_an_unknown_eraser_is_refused():
    with pytest.raises(UnknownNameError, match="known"):
        bench_heal(HealBench(**{**SMALL, "eraser": "nothing"}))
    assert module.OTHERS > 0
