"""Spans that the agent has repeated: what a cascade finds of them, and how it is summed up."""

import json

import pytest

from kv_retract.evals.cascade import CascadeEval, CascadeSample, cascade_rows, eval_cascade, told
from kv_retract.evals.specs import Spec
from kv_retract.training.corpus import generate


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    out = tmp_path_factory.mktemp("cascade") / "out"
    found = eval_cascade(CascadeEval(out=out, tasks=("facts",), lengths=(256,), n=2, arms=(Spec("kveraser"),)))
    return out, found


def test_the_bundled_model_repeats_itself_without_a_cascade_and_not_with_one(metrics):
    _, found = metrics
    rows = {(row["arm"], row["cascade"]): row for row in found["rows"]}
    assert set(rows) == {(arm, c) for arm in ("recompute", "kveraser") for c in ("none", "quoted", "lineage")}
    for arm in ("recompute", "kveraser"):
        assert rows[arm, "none"]["derived"] == 0 and rows[arm, "none"]["quote_found"] is None
        assert rows[arm, "quoted"]["quote_found"] == 1 and rows[arm, "quoted"]["derived"] >= 1
        assert rows[arm, "none"]["leak"] > rows[arm, "quoted"]["leak"]
        assert rows[arm, "none"]["affected_accuracy"] < rows[arm, "quoted"]["affected_accuracy"]
    assert rows["recompute", "quoted"]["leak"] == 0


def test_the_folder_holds_configuration_and_samples(metrics):
    out, found = metrics
    assert json.loads((out / "metrics.json").read_text())["rows"] == found["rows"]
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 3 and {line["task"] for line in lines} == {"facts"}
    assert found["config"]["columns"].keys() >= {"leak", "quote_found"}


def test_rows_are_means_with_errors():
    samples = [
        CascadeSample(sample_id=str(i), task="facts", arm="mask", cascade="quoted", affected=bool(i), leaked=not i,
                      unaffected=None if i else 0.5, derived=2 * i, quote_found=True)
        for i in range(2)
    ]  # fmt: skip
    [row] = cascade_rows(samples)
    assert (row["n"], row["affected_accuracy"], row["leak"], row["derived"]) == (2, 0.5, 0.5, 1)
    assert row["unaffected_accuracy"] == 0.5 and row["affected_accuracy_se"] == pytest.approx(0.5)


def test_the_trace_goes_on_with_the_answer():
    sample = generate("facts", seed=1, length=256)
    longer = told(sample, sample.probes[0])
    assert longer.messages[: len(sample.messages)] == sample.messages
    assert longer.messages[len(sample.messages) + 1].content == sample.probes[0].answer
