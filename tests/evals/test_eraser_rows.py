"""Rows of the comparison of erasers, against naive recomputation of hand-made samples."""

import random
from dataclasses import fields, replace
from itertools import product

import pytest

from kv_retract.evals.eraser_rows import (
    COLUMNS,
    DEPTHS,
    EXTRACTION_COLUMNS,
    SPAN_LENGTHS,
    eraser_rows,
    extraction_rows,
    paired_rows,
)
from kv_retract.evals.erasers import ArmSample
from kv_retract.evals.stats import paired_interval, standard_error

GROUPS = ("arm", "task", "kind", "length", "span_length", "depth")
SHARES = {"affected_accuracy": "affected", "leak": "leaked", "unaffected_accuracy": "unaffected"}
MEANS = ("kl", "top1", "tokens_recomputed")


def sample(arm="mask", sample_id="s0", **changes):
    made = ArmSample(
        sample_id=sample_id, task="facts", kind="tool_result", length=256, span_length=20, depth=0.5, arm=arm,
        affected=(True,), leaked=(False,), unaffected=(True, False), kl=0.5, top1=0.75, edit_ms=3.0, next_step_ms=5.0,
        tokens_recomputed=10, likelier=True, extracted=False,
    )  # fmt: skip
    return replace(made, **changes)


def drawn(seed=0):
    """Samples of two arms on the same traces: two tasks, three kinds, two lengths, spans anywhere."""
    rng = random.Random(seed)

    def some(least, most):
        return tuple(rng.random() < 0.5 for _ in range(rng.randint(least, most)))

    made = []
    for task, length, number in product(("facts", "updates"), (256, 1024), range(6)):
        trace = sample(
            sample_id=f"{task}-{length}-{number}", task=task, length=length, kind=rng.choice(("tool_result", "update")),
            span_length=rng.randint(1, 100), depth=rng.random(), affected=some(1, 2), unaffected=some(0, 3),
        )  # fmt: skip
        for arm in ("recompute", "mask"):
            right, others = (tuple(rng.random() < 0.5 for _ in asked) for asked in (trace.affected, trace.unaffected))
            leaked = tuple(not given and rng.random() < 0.5 for given in right)
            made.append(
                replace(
                    trace, arm=arm, affected=right, unaffected=others, leaked=leaked, kl=rng.random(),
                    top1=rng.random(), edit_ms=rng.random(), next_step_ms=rng.random(),
                    tokens_recomputed=rng.randrange(100), likelier=rng.choice((True, False, None)),
                    extracted=rng.random() < 0.5,
                )
            )  # fmt: skip
    return made


def rows_of(samples, **chosen):
    return [row for row in eraser_rows(samples) if all(row[name] == value for name, value in chosen.items())]


def inside(sample, column, label):
    """Whether a sample belongs to a row by one of its columns; a range is told by its rounded ends."""
    if label == "all":
        return True
    if column not in ("span_length", "depth"):
        return getattr(sample, column) == label
    low, high = map(float, label.split(" to "))
    value = getattr(sample, column)
    return low - 1e-3 <= value < high + 1e-3 if column == "depth" else low <= value < high


# -- rows -----------------------------------------------------------------------------------------------------------


def test_every_row_is_the_mean_of_its_samples():
    samples = drawn()
    assert not any(abs(s.depth - edge) < 2e-3 for s in samples for edge in DEPTHS), "the labels are rounded"
    for row in eraser_rows(samples):
        group = [s for s in samples if all(inside(s, name, row[name]) for name in GROUPS)]
        assert row["n"] == len(group) > 0
        for name, source in SHARES.items():
            values = [float(v) for s in group for v in getattr(s, source)]
            clusters = [s.sample_id for s in group for _ in getattr(s, source)]
            assert row[name] == (pytest.approx(sum(values) / len(values)) if values else None)
            assert row[f"{name}_se"] == pytest.approx(standard_error(values, clusters))
        for name in MEANS:
            values = [float(getattr(s, name)) for s in group]
            assert row[name] == pytest.approx(sum(values) / len(values))
            assert row[f"{name}_se"] == pytest.approx(standard_error(values))
        for name in ("edit_ms", "next_step_ms"):
            values = sorted(getattr(s, name) for s in group)
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            assert row[f"{name}_median"] == pytest.approx(middle)


def test_the_views():
    samples = drawn()
    rows = eraser_rows(samples)
    keys = [tuple(row[name] for name in GROUPS) for row in rows]
    assert len(set(keys)) == len(keys)
    by_task = [row for row in rows if row["task"] != "all"]
    assert {(r["arm"], r["task"], r["kind"], r["length"]) for r in by_task} == {
        (s.arm, s.task, s.kind, s.length) for s in samples
    }
    assert all(row["span_length"] == row["depth"] == "all" for row in by_task)
    rest = [row for row in rows if row["task"] == "all"]
    assert all(row["kind"] == "all" for row in rest)
    assert all(sum(row[name] != "all" for name in ("length", "span_length", "depth")) <= 1 for row in rest)
    for view in (by_task, *([r for r in rest if r[name] != "all"] for name in ("length", "span_length", "depth"))):
        for arm in ("recompute", "mask"):
            assert sum(row["n"] for row in view if row["arm"] == arm) == 24, "every trace is in one row of a view"
    assert [row["n"] for row in rows_of(samples, task="all", length="all", span_length="all", depth="all")] == [24, 24]


@pytest.mark.parametrize(
    ("value", "label"), [(0, 0), (15, 0), (16, 1), (31, 1), (32, 2), (63, 2), (255, 3), (256, 4), (2048, 4)]
)
def test_bins_of_the_span_length(value, label):
    labels = {row["span_length"] for row in eraser_rows([sample(span_length=value)])} - {"all"}
    low, high = SPAN_LENGTHS[label : label + 2]
    assert low <= value < high and len(labels) == 1 and labels.pop().startswith(f"{low} to ")


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.0, "0 to 0.333"), (0.33, "0 to 0.333"), (1 / 3, "0.333 to 0.667"), (0.67, "0.667 to 1"), (1.0, "0.667 to 1")],
)
def test_bins_of_the_depth(value, label):
    assert {row["depth"] for row in eraser_rows([sample(depth=value)])} == {"all", label}


def test_labels_of_bins_are_whole_numbers():
    labels = {row["span_length"] for row in eraser_rows([sample(span_length=100)])} - {"all"}
    assert all(part.isdecimal() for label in labels for part in label.split(" to "))


def test_a_span_longer_than_any_is_in_the_last_bin():
    (row,) = (row for row in eraser_rows([sample(span_length=5000)]) if row["span_length"] != "all")
    assert row["n"] == 1


def test_a_task_without_other_answers():
    (row,) = rows_of([sample(unaffected=())], task="facts")
    assert row["unaffected_accuracy"] is row["unaffected_accuracy_se"] is None
    assert row["affected_accuracy"] == 1.0 and row["affected_accuracy_se"] is None, "one trace has no error"


def test_answers_of_one_trace_are_no_independent_ones():
    """Means and errors by hand: three traces with 2, 1 and 1 answers."""
    samples = [
        sample(sample_id="a", affected=(True, True), leaked=(False, False)),
        sample(sample_id="b", affected=(False,), leaked=(True,)), sample(sample_id="c", affected=(False,)),
    ]  # fmt: skip
    (row,) = rows_of(samples, task="facts")
    assert (row["n"], row["affected_accuracy"], row["leak"]) == (3, 0.5, 0.25)
    # Deviations by trace: 0.5 + 0.5, -0.5, -0.5 (2411.00640, 2.2).
    assert row["affected_accuracy_se"] == pytest.approx((3 / 2 * (1 + 0.25 + 0.25)) ** 0.5 / 4)


def test_nothing_measured_is_no_row():
    assert eraser_rows([]) == paired_rows([], "recompute") == extraction_rows([]) == []


# -- differences ----------------------------------------------------------------------------------------------------


def test_differences_are_those_on_the_same_trace():
    samples = drawn(1)
    rows = paired_rows(samples, "recompute")
    assert [(row["length"], row["arm"]) for row in rows] == [
        (length, arm) for length in ("all", 256, 1024) for arm in ("recompute", "mask")
    ]
    base = {s.sample_id: s for s in samples if s.arm == "recompute"}
    for row in rows:
        chosen = [s for s in samples if s.arm == row["arm"] and row["length"] in ("all", s.length)]
        assert row["n"] == len(chosen)
        for name, source in (("affected", "affected"), ("leak", "leaked"), ("unaffected", "unaffected")):
            differences, traces = [], []
            for s in chosen:
                for mine, other in zip(getattr(s, source), getattr(base[s.sample_id], source), strict=True):
                    differences.append(int(mine) - int(other))
                    traces.append(s.sample_id)
            assert row[name] == pytest.approx(sum(differences) / len(differences))
            assert row[f"{name}_ci"] == paired_interval(differences, traces)
            low, high = row[f"{name}_ci"]
            assert low <= row[name] <= high and (low < high) == (row["arm"] == "mask")


def test_differences_of_answers_that_are_not_there():
    samples = [sample(arm, unaffected=(), sample_id=i) for i in ("a", "b") for arm in ("recompute", "mask")]
    for row in paired_rows(samples, "recompute"):
        assert row["unaffected"] is row["unaffected_ci"] is None and row["affected"] == 0.0
        assert row["affected_ci"] == (0.0, 0.0)
    assert {row["affected_ci"] for row in paired_rows(samples[:2], "recompute")} == {None}, "one trace"


def test_a_constant_loss_is_told_with_its_sign():
    samples = [sample(arm, i, affected=(arm == "recompute",)) for i in ("a", "b") for arm in ("recompute", "mask")]
    (row,) = (r for r in paired_rows(samples, "recompute") if r["arm"] == "mask" and r["length"] == "all")
    assert (row["affected"], row["affected_ci"], row["leak"]) == (-1.0, (-1.0, -1.0), 0.0)


# -- extraction -----------------------------------------------------------------------------------------------------


def test_where_no_value_was_retracted_nothing_counts():
    samples = [
        sample(sample_id="a", likelier=True, extracted=True), sample(sample_id="b", likelier=False, extracted=False),
        sample(sample_id="c", likelier=True, extracted=False), sample(sample_id="d", likelier=None, extracted=None),
        sample("none", "d", likelier=None, extracted=None),
    ]  # fmt: skip
    mask, none = extraction_rows(samples)
    assert (mask["arm"], mask["n"]) == ("mask", 3)
    assert (mask["likelier"], mask["extracted"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert mask["likelier_se"] == pytest.approx(standard_error([1.0, 0.0, 1.0]))
    assert none == {
        "arm": "none", "n": 0, "likelier": None, "likelier_se": None, "extracted": None, "extracted_se": None
    }  # fmt: skip


# -- columns --------------------------------------------------------------------------------------------------------


def test_every_column_is_explained():
    explained = {name for key in COLUMNS for name in key.split(", ")}
    for row in eraser_rows(drawn()):
        for name in set(row) - {"arm", "task", "kind", "length"}:
            assert name in explained or (name.endswith("_se") and name.removesuffix("_se") in explained)
    assert explained - {"_se"} <= set(eraser_rows(drawn())[0]) and "_se" in explained
    for row in extraction_rows(drawn()):
        assert {name.removesuffix("_se") for name in row} - {"arm", "n"} == set(EXTRACTION_COLUMNS)
    assert all(COLUMNS.values()) and all(EXTRACTION_COLUMNS.values())


def test_samples_hold_what_the_rows_group_by():
    assert {field.name for field in fields(ArmSample)} >= {*GROUPS, *SHARES.values(), *MEANS, *EXTRACTION_COLUMNS}
