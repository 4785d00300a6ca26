import numpy as np
import pytest

from kv_retract.engine.hf import HFEngine
from kv_retract.engine.models import load_model
from kv_retract.errors import UnknownNameError
from kv_retract.evals import bench
from kv_retract.evals.bench import BenchSettingError, EditBench, bench_edit
from kv_retract.evals.specs import Spec, SpecError

ALL = ["none", "mask", "shift", "repair", "selective", "erratum", "recompute"]


@pytest.fixture(scope="module")
def document():
    done = []
    found = bench_edit(
        EditBench(context=256, span=16, repeats=1, model="random"), progress=lambda *step: done.append(step)
    )
    assert done == [(i, 14) for i in range(1, 15)], "a warm-up and a repetition of seven arms"
    return found


def test_keys(document):
    assert {
        "context", "span", "depth", "model", "arms", "ratio_to_recompute", "fork_page_fraction", "match_prefix_ms_32k",
    } <= set(document)  # fmt: skip
    values = ("context", "span", "depth", "model", "repeats", "dtype", "seed")
    assert [document[key] for key in values] == [256, 16, 0.1, "random", 1, "float32", 0]
    assert document["machine"]["device"] == "cpu" and document["versions"]["torch"]
    assert document["num_parameters"] == load_model("random").model.num_parameters()


def test_every_arm_was_timed(document):
    assert list(document["arms"]) == ALL
    for arm in document["arms"].values():
        edit = arm["edit_ms"]
        assert edit["n"] == 1 and arm["edit_ms_median"] == edit["median"] == edit["minimum"] > 0
        assert arm["next_step_ms_median"] > 0


def test_ratios(document):
    arms, ratios = document["arms"], document["ratio_to_recompute"]
    assert ratios["recompute"] == 1
    for name in ALL:
        assert ratios[name] == arms[name]["edit_ms_median"] / arms["recompute"]["edit_ms_median"]


def test_a_fork_takes_its_own_pages_only(document):
    assert document["fork_page_fraction"] == pytest.approx(bench.NEXT_TOKENS / 256)
    assert 0 < document["match_prefix_ms_32k"] < 1000


def test_pages_of_several_tokens():
    engine = HFEngine(load_model("random").model, max_tokens=1024, page_size=8)
    ids = np.arange(256 + bench.NEXT_TOKENS)
    assert bench.fork_page_fraction(engine, ids) == pytest.approx(bench.NEXT_TOKENS / 256)
    assert engine.tokens_in_use() == 0


def test_the_reference_runs_once_and_last_whatever_is_asked_for():
    arms = (Spec("recompute"), Spec("repair", {"tokens": 4}), Spec("mask"))
    found = bench_edit(EditBench(context=64, span=8, repeats=2, model="random", arms=arms))
    assert list(found["arms"]) == ["repair:tokens=4", "mask", "recompute"]
    assert {arm["edit_ms"]["n"] for arm in found["arms"].values()} == {2}


@pytest.mark.parametrize("depth", [0.0, 0.75])
def test_edits_at_both_ends(depth):
    found = bench_edit(EditBench(context=64, span=16, depth=depth, repeats=1, model="random", arms=(Spec("shift"),)))
    assert found["depth"] == depth and found["arms"]["shift"]["edit_ms_median"] > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"span": 0}, "got 0 tokens from token 25 on of 256"),
        ({"span": 300}, "got 300 tokens from token 25 on of 256.*--span"),
        ({"depth": 1.0}, "got 16 tokens from token 256 on"),
        ({"depth": -0.001}, "expected a depth from 0 to 1, got -0.001"),
        ({"depth": float("nan")}, "expected a depth from 0 to 1, got nan"),
        ({"repeats": 0}, "0 repetitions"),
        ({"context": 32_760}, "model 'random' has 32768 positions, the thread needs 32776; pass a smaller --context"),
    ],
)
def test_settings_that_do_not_fit(settings, told):
    with pytest.raises(BenchSettingError, match=told):
        bench_edit(EditBench(**{"context": 256, "span": 16, "model": "random", **settings}))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"model": "nope"}, UnknownNameError),
        ({"arms": (Spec("nope"),)}, UnknownNameError),
        ({"arms": (Spec("recompute", {"x": 1}),)}, SpecError),
    ],
)
def test_parts_that_do_not_exist(settings, error):
    with pytest.raises(error):
        bench_edit(EditBench(**{"context": 256, "span": 16, "model": "random", **settings}))
