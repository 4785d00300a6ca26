import math

import pytest

from kv_retract.evals.metrics import ALL, COLUMNS, metric_rows
from kv_retract.evals.walk import Sample


def sample(arm="mask", source="t:1", **kw):
    values = dict(
        trace_id="t", source=source, step=4, arm=arm, policies=("tool_error",), own_edit=True, tokens_scored=8, kl=1.0,
        top1=0.5, context_tokens=100, suffix_tokens=40, tokens_erased=10, tokens_recomputed=0, tokens_moved=0,
        edit_ms=2.0, next_step_ms=4.0, cached_tokens=80, prefilled_tokens=20,
    )  # fmt: skip
    return Sample(**{**values, **kw})


def row_of(rows, arm, policy=ALL):
    (row,) = [r for r in rows if (r["arm"], r["policy"]) == (arm, policy)]
    return row


def test_one_row_per_arm_and_policy_in_the_order_given():
    rows = metric_rows([sample()], ["shift", "mask"], ["tool_error", "superseded"])
    assert [(r["policy"], r["arm"]) for r in rows] == [
        (policy, arm) for policy in (ALL, "tool_error", "superseded") for arm in ("shift", "mask")
    ]
    assert all(set(row) == {"arm", "policy", *COLUMNS} for row in rows)
    empty = row_of(rows, "shift")
    assert (empty["n"], empty["n_not_own"]) == (0, 0)
    assert {empty[column] for column in COLUMNS if column not in ("n", "n_not_own")} == {None}


def test_means_medians_and_the_error_over_traces():
    samples = [
        sample(kl=1.0, edit_ms=1.0, source="t:1", cached_tokens=60, tokens_erased=5),
        sample(kl=3.0, edit_ms=2.0, source="t:1", tokens_erased=6),
        sample(kl=2.0, edit_ms=9.0, source="t:2", tokens_recomputed=30),
    ]
    row = row_of(metric_rows(samples, ["mask"], []), "mask")
    assert (row["n"], row["kl_mean"], row["edit_ms_median"]) == (3, 2.0, 2.0)
    assert (
        row["tokens_erased"] == 7 and row["tokens_recomputed"] == 10 and row["cached_tokens"] == pytest.approx(220 / 3)
    )
    assert row["kl_se"] == 0, "the deviations of the first trace cancel"
    alone = [sample(kl=k, source=f"t:{i}") for i, k in enumerate((1.0, 3.0, 2.0))]
    assert row_of(metric_rows(alone, ["mask"], []), "mask")["kl_se"] == pytest.approx(1 / math.sqrt(3))


def test_traces_with_one_id_from_two_files_are_two():
    pair = [sample(kl=1.0, source="a:1"), sample(kl=3.0, source="b:1")]
    assert row_of(metric_rows(pair, ["mask"], []), "mask")["kl_se"] == pytest.approx(1)
    same = [sample(kl=1.0), sample(kl=3.0)]
    assert row_of(metric_rows(same, ["mask"], []), "mask")["kl_se"] is None


def test_edits_that_were_not_the_arms_own_are_counted_apart():
    samples = [sample(kl=1.0), sample(own_edit=False, kl=0.0, edit_ms=None)]
    row = row_of(metric_rows(samples, ["mask"], []), "mask")
    assert (row["n"], row["n_not_own"], row["kl_mean"]) == (1, 1, 1.0)


def test_a_step_of_two_policies_counts_for_both_and_once_for_all():
    rows = metric_rows([sample(policies=("a", "b")), sample(policies=("b",))], ["mask"], ["a", "b"])
    assert [row_of(rows, "mask", policy)["n"] for policy in (ALL, "a", "b")] == [2, 1, 2]


def test_what_was_not_scored_is_no_zero():
    row = row_of(metric_rows([sample(kl=None, top1=None), sample(kl=4.0, top1=1.0)], ["mask"], []), "mask")
    assert (row["n"], row["kl_mean"], row["top1"]) == (2, 4.0, 1.0)
