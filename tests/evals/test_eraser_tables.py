"""Tables of what erasers are worth: hand-made results in, Markdown out."""

import json

import pytest

from kv_retract.evals import eraser_tables as tables
from kv_retract.evals.readme import TABLES, TableError, with_tables

BLIND, MAP = ('kveraser:variant="blind"', 'kveraser:variant="kv_map"')
MACHINE = {"processor": "Abacus 3", "threads": 2}


def lines(text):
    """Return the cells of every line of the tables, and the prose."""
    assert text.endswith("\n") and not text.endswith("\n\n")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    heads = [line for line in text.splitlines() if line.startswith("|---")]
    assert heads and all(line == "|---" * line.count("---") + "|" for line in heads)
    return rows, " ".join(line for line in text.splitlines() if line and line[0] != "|")


def columns_fit(text):
    """Every line of a table has as many cells as its head."""
    for block in text.split("\n\n"):
        counts = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(counts) <= 1, block


def row(arm, *, task="all", kind="all", length="all", span_length="all", depth="all", **values):
    figures = {
        "n": 4, "affected_accuracy": 0.5, "affected_accuracy_se": 0.25, "leak": 0.125, "leak_se": 0.0625,
        "unaffected_accuracy": 1.0, "unaffected_accuracy_se": 0.0, "kl": 0.01234, "kl_se": 0.1, "top1": 0.9,
        "top1_se": 0.1, "edit_ms_median": 12.345, "next_step_ms_median": 3.0, "tokens_recomputed": 1234.5,
        "tokens_recomputed_se": 1.0,
    }  # fmt: skip
    where = {"task": task, "kind": kind, "length": length, "span_length": span_length, "depth": depth}
    return {"arm": arm, **where, **figures, **values}


def paired(arm, length="all", **values):
    figures = {"affected": -0.01, "leak": 0.0, "unaffected": 0.005}
    intervals = {f"{name}_ci": [value - 0.02, value + 0.02] for name, value in figures.items()}
    return {"arm": arm, "length": length, "n": 4, **figures, **intervals, **values}


def erasers():
    return {
        "config": {
            "model": "m", "arms": ["recompute", "mask", BLIND], "tasks": ["facts", "updates"], "lengths": [256, 1024],
            "n": 12, "split": "test", "dtype": "float32", "machine": MACHINE,
        },
        "rows": [
            *(row(arm, task="facts", kind="tool_result", length=256, n=3, leak=leak)
              for arm, leak in (("recompute", 0.0), ("mask", 1.0), (BLIND, 0.5))),
            *(row(arm, task="facts", kind="tool_result", length=1024, n=1, leak=0.0)
              for arm in ("recompute", "mask", BLIND)),
            *(row(arm, task="errors", kind="error", n=2, leak=0.25) for arm in ("recompute", "mask", BLIND)),
            *(row(arm, length=256, kl=9.0) for arm in ("recompute", "mask", BLIND)),
            row("recompute", kl=0.0, tokens_recomputed=800.0), row("mask", unaffected_accuracy=None),
            row(BLIND, leak_se=None), row(BLIND, span_length="0 to 16", kl=8.0), row(BLIND, depth="0 to 0.333", kl=7.0),
        ],
        "paired": [
            paired("recompute"), paired("mask"), paired(BLIND),
            paired(BLIND, 256, unaffected=None, unaffected_ci=None, affected=0.1, affected_ci=None),
        ],
        "extraction": [
            {"arm": "mask", "n": 4, "likelier": 0.75, "likelier_se": 0.25, "extracted": 0.0, "extracted_se": 0.0},
            {"arm": BLIND, "n": 0, "likelier": None, "likelier_se": None, "extracted": None, "extracted_se": None},
        ],
    }  # fmt: skip


def latency():
    cost = {("recompute", 1024): 100.0, ("recompute", 4096): 500.0, (MAP, 1024): 2.0, (MAP, 4096): 2.5}
    rows = [
        {"context": c, "depth": 0.5, "arm": a, "edit_ms": ms, "speedup": cost["recompute", c] / ms, "of_floor": ms / 2}
        for (a, c), ms in cost.items()
    ]
    other = [{**r, "depth": 0.1, "edit_ms": 77.0} for r in rows]
    growth = [{"arm": "recompute", "depth": 0.5, "growth": 5.0}, {"arm": MAP, "depth": 0.5, "growth": 1.25}]
    growth += [{**g, "depth": 0.1, "growth": 9.0} for g in growth]
    facts = {"span": 128, "model": "m", "num_parameters": 3_300_000, "dtype": "bfloat16", "repeats": 20}
    return {"rows": other + rows, "growth": growth, "machine": MACHINE, **facts}


def repeated():
    def one(arm, mode, edits, leak, kl=0.1):
        shares = {"affected_accuracy": 1 - leak, "leak": leak, "unaffected_accuracy": 0.875}
        return {"arm": arm, "mode": mode, "edits": edits, "n": 4, **shares, "kl": kl, "top1": 0.5, "edit_ms": 3.0}

    rows = [one("mask", "in turn", 1, 0.5), one("mask", "at once", 1, 0.625), one(BLIND, "after healing", 1, 0.75)]
    return {"rows": [*rows, one(BLIND, "in turn", 64, 0.0, kl=2345.6)]}


def shared():
    arm = {"first_ms": 12.3, "next_ms_median": 0.4567, "all_ms": 40.0, "tokens_in_use": 8832}
    written = {"tokens_written_first": 128, "tokens_written_all": 128}
    return {
        "threads": 64, "prefix": 512, "span": 128, "suffix": 100, "model": "m",
        "arms": {BLIND: {**arm, **written}, "recompute": {**arm, **written, "next_ms_median": None}},
    }  # fmt: skip


def sglang():
    def by_arm(plain, kveraser):
        return {"1024": {"plain": plain, "kveraser": kveraser}, "8192": {"plain": 10 * plain, "kveraser": kveraser}}

    return {
        "ttft_ms": by_arm(200.0, 20.0), "edit_ms": by_arm(0.0, 5.0), "speedup_vs_plain": by_arm(1.0, 8.0),
        "ordinary_traffic_ratio": {"median": 0.99, "min": 0.9, "max": 1.1}, "ledger_hook_ms": {"1": 0.1, "100": 0.5},
        "span": 64, "depth": 0.1, "model": "m", "machine": MACHINE, "repeats": 7,
    }  # fmt: skip


DATA = {
    "erasers": erasers, "erasers-kinds": erasers, "erasers-documents": erasers, "extraction": erasers,
    "repeated": repeated, "latency": latency, "shared": shared, "sglang": sglang,
}  # fmt: skip


# -- each table -----------------------------------------------------------------------------------------------------


def test_erasers():
    rows, prose = lines(tables.erasers_table(erasers()))
    assert rows[1] == ["`recompute`", "0.500 ± 0.250", "0.125 ± 0.062", "1.000 ± 0.000", "0", "12.3", "800"]
    assert rows[2] == ["`mask`", "0.500 ± 0.250", "0.125 ± 0.062", "–", "0.0123", "12.3", "1234"]
    assert rows[3] == ["`kveraser` blind", "0.500 ± 0.250", "0.125", "1.000 ± 0.000", "0.0123", "12.3", "1234"]
    assert rows[4][0] == "eraser", "one row per arm: those of a length, a range or a task are left out"
    assert rows[5:] == [
        ["`kveraser` blind", "all", "-1.0 [-3.0, +1.0]", "+0.0 [-2.0, +2.0]", "+0.5 [-1.5, +2.5]"],
        ["`kveraser` blind", "256", "+10.0", "+0.0 [-2.0, +2.0]", "–"],
    ]
    for told in ("Split `test`", "tasks `facts`, `updates`", "12 traces", "256, 1024 tokens", "`m`, float32, Abacus 3"):
        assert told in prose


def test_kinds_are_weighted_by_traces():
    rows, _ = lines(tables.kinds_table(erasers()))
    assert rows == [
        ["task", "span", "n", "`recompute`", "`mask`", "`kveraser` blind"],
        ["`errors`", "error", "2", "0.25", "0.25", "0.25"],
        ["`facts`", "tool result", "4", "0.00", "0.75", "0.38"],
    ]


def test_extraction():
    rows, _ = lines(tables.extraction_table(erasers()))
    assert rows[1:] == [["`mask`", "4", "0.750 ± 0.250", "0.000 ± 0.000"], ["`kveraser` blind", "0", "–", "–"]]


def test_sglang():
    rows, prose = lines(tables.sglang_table(sglang()))
    assert rows[1:] == [["1024", "0 + 200 (1)", "5 + 20 (8)"], ["8192", "0 + 2000 (10)", "5 + 20 (8)"]]
    for told in ("64 tokens at 10% depth", "Abacus 3", "0.99 (0.9 to 1.1)", "0.1 ms with 1, 0.5 ms with 100"):
        assert told in prose


def test_latency_at_the_deepest_place():
    rows, prose = lines(tables.latency_table(latency()))
    head = "tokens, ms (times as fast)"
    assert rows == [
        ["eraser", f"1024 {head}", f"4096 {head}", "longest over shortest", "times the least"],
        ["`recompute`", "100 (1)", "500 (1)", "5.00", "250"],
        ["`kveraser` kv_map", "2 (50)", "2.5 (200)", "1.25", "1.25"],
    ]
    assert "Erasing 128 tokens at 50% depth; model `m` (3.3 M parameters), bfloat16, Abacus 3 with 2 threads" in prose
    assert "medians of 20 repetitions" in prose


def test_repeated_edits_in_turn():
    rows, _ = lines(tables.repeated_table(repeated()))
    assert rows[1:] == [
        ["`mask`", "1", "0.50", "0.50", "0.88", "0.1"],
        ["`kveraser` blind", "64", "1.00", "0.00", "0.88", "2346"],
    ]


def test_a_shared_document():
    rows, prose = lines(tables.shared_table(shared()))
    assert rows[1:] == [
        ["`kveraser` blind", "12.3", "0.457", "40", "8832"],
        ["`recompute`", "12.3", "–", "40", "8832"],
    ]
    assert prose == "64 threads with 512 tokens and a document of 128 in common, and 100 of their own."


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        ("mask", "`mask`"), ("repair:tokens=16", "`repair:tokens=16`"), ("recompute", "`recompute`"),
        (BLIND, "`kveraser` blind"), ('kveraser:variant="suffix_aware"', "`kveraser` suffix_aware"),
    ],
)  # fmt: skip
def test_names_of_arms(arm, name):
    data = {**shared(), "arms": {arm: shared()["arms"][BLIND]}}
    rows, _ = lines(tables.shared_table(data))
    assert rows[1][0] == name


@pytest.mark.parametrize("arm", ['kveraser:path="/home/me/runs/eraser"', "kveraser"])
def test_names_of_arms_tell_no_place(arm):
    rows, _ = lines(tables.shared_table({**shared(), "arms": {arm: shared()["arms"][BLIND]}}))
    assert "/" not in rows[1][0] and rows[1][0].count("kveraser") == 1


# -- in pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA)
def test_every_table_has_its_file(tmp_path, name):
    file, write = TABLES[name]
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps(DATA[name]()))
    page = with_tables(f"Before.\n<!-- table: {name} -->\nold\n<!-- end of {name} -->\nAfter.\n", tmp_path)
    assert page == (f"Before.\n<!-- table: {name} -->\n{write(DATA[name]())}<!-- end of {name} -->\nAfter.\n"), (
        "what was read of a file is what was given"
    )
    columns_fit(write(DATA[name]()))
    assert "None" not in page and "nan" not in page and with_tables(page, tmp_path) == page


def test_the_tables_of_learned_erasers_are_known():
    assert set(DATA) <= set(TABLES)
    assert TABLES["erasers-documents"][0] != TABLES["erasers"][0] == TABLES["extraction"][0]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("content", [None, "{}", "["])
def test_results_that_are_missing_or_broken(tmp_path, name, content):
    file, _ = TABLES[name]
    if content is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    with pytest.raises(TableError, match=f"table '{name}' needs '{file}' in .*make results"):
        with_tables(f"<!-- table: {name} -->\n<!-- end of {name} -->", tmp_path)
