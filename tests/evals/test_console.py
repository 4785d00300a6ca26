import io
from dataclasses import replace

import pytest
from rich.console import Console

from kv_retract.evals.bench import EditBench, bench_edit
from kv_retract.evals.bench_console import print_bench, print_latency, print_shared
from kv_retract.evals.console import (
    MAX_PROBLEMS,
    print_erasers,
    print_parts,
    print_repeated,
    print_replay,
)
from kv_retract.evals.report import number
from kv_retract.evals.specs import Spec


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def printed(console):
    return console.file.getvalue()


def cells_of(console, first):
    return next(line.split() for line in printed(console).splitlines() if line.split()[:1] == [first])


def test_rows_over_all_policies(sample_run, console):
    result = sample_run[1]
    print_replay(result, console)
    assert "2 traces, 31 steps, 5 spans retracted, 0 traces cut, 0 not readable" in printed(console)
    assert "Spans by policy: tool_error 3, superseded 2" in printed(console)
    assert "Note: seeded random weights: quality figures mean nothing." in printed(console)
    for row in result.rows:
        if row["policy"] == "all":
            cells = cells_of(console, row["arm"])
            assert cells[1:4] == [number(row[column]) for column in ("n", "kl_mean", "kl_se")]
            assert cells[-1] == number(row["cached_tokens"])
    assert "\x1b" not in printed(console)


def test_problems_are_shown_as_they_are_and_cut(sample_run, console):
    problems = [{"source": f"[bold]s{i}[/nope]\x1b[31m", "message": "m\u202e"} for i in range(MAX_PROBLEMS + 2)]
    print_replay(replace(sample_run[1], problems=problems), console)
    assert "[bold]s0[/nope]⌈U+001B⌋[31m: m⌈U+202E⌋" in printed(console)
    assert f"s{MAX_PROBLEMS - 1}" in printed(console) and f"s{MAX_PROBLEMS}" not in printed(console)
    assert "and 2 more problems, listed in the report" in printed(console)


def test_a_trained_model_has_no_note(sample_run, console):
    result = sample_run[1]
    print_replay(replace(result, config={**result.config, "quality_note": ""}), console)
    assert "Note" not in printed(console)


def test_labels_are_no_markup(sample_run, console):
    result = sample_run[1]
    print_replay(replace(result, rows=[{**row, "arm": "x:a=[true]"} for row in result.rows]), console)
    assert "x:a=[true]" in printed(console)


def test_bench(console):
    document = bench_edit(EditBench(context=64, span=8, repeats=1, model="random", arms=(Spec("mask"),)))
    document["model"] = "[/not-markup]"
    print_bench(document, console)
    assert "Erase 8 of 64 tokens at 10% depth; model [/not-markup], float32" in printed(console)
    assert cells_of(console, "mask")[1] == number(document["arms"]["mask"]["edit_ms_median"])
    assert "100.00%" in cells_of(console, "recompute")
    assert "takes 25.00% of the thread's pages" in printed(console)


def test_parts(console):
    parts = [{"name": "[red]a[/b]", "summary": "[bold]does[/x]", "parameters": {"x": "[1]", "y": "(required)"}}]
    print_parts("policy", parts, console)
    for text in ("policy", "[red]a[/b]", "[bold]does[/x]", "x=[1], y=(required)"):
        assert text in printed(console)


# -- learned erasers, by hand ---------------------------------------------------------------------------------------

ARM = "x:a=[true]"
"""A label that looks like markup."""


def eraser_row(arm=ARM, **where):
    shares = {"affected_accuracy": 0.5, "leak": 0.125, "unaffected_accuracy": None, "kl": 0.01234, "top1": 0.75}
    errors = {f"{name}_se": 0.0625 for name in shares} | {"unaffected_accuracy_se": None}
    costs = {"edit_ms_median": 12.345, "next_step_ms_median": 3.0, "tokens_recomputed": 1234.5}
    everywhere = dict.fromkeys(("task", "kind", "length", "span_length", "depth"), "all")
    return {"arm": arm, "n": 4, **everywhere, **shares, **errors, **costs, **where}


def test_erasers(console):
    rows = [
        eraser_row(length=256), eraser_row(), eraser_row("y", task="facts"), eraser_row("y", span_length="0 to 16"),
        eraser_row("y", depth="0 to 0.333"),
    ]  # fmt: skip
    extraction = [{"arm": "[/b]", "n": 3, "likelier": 0.5, "extracted": None}]
    config = {"model": "[bold]m", "split": "test", "n": 12}
    console.width = 240  # so that no cell is folded
    print_erasers({"config": config, "rows": rows, "extraction": extraction}, console)
    assert "Model [bold]m, split test, 12 traces per task and length" in printed(console)
    found = [line.split() for line in printed(console).splitlines() if line.split()[:1] == [ARM]]
    shares = "0.5 ± 0.0625 0.125 ± 0.0625 – ± – 0.0123 ± 0.0625 0.75 ± 0.0625".split()
    assert found == [[ARM, length, "4", *shares, "12.3", "3", "1234"] for length in ("256", "all")]
    assert cells_of(console, "[/b]") == ["[/b]", "3", "0.5", "–"]
    assert "y" not in [line.split()[0] for line in printed(console).splitlines() if line.split()], "rows of other views"


def test_repeated(console):
    names = ("affected_accuracy", "leak", "unaffected_accuracy", "kl", "top1")
    shares = {**dict.fromkeys(names, 0.5), **{f"{name}_se": None for name in names}}
    rows = [
        {"arm": ARM, "mode": mode, "edits": 16, "n": 4, **shares, "edit_ms": 2.5} for mode in ("in turn", "at once")
    ]
    print_repeated({"rows": rows}, console)
    found = [line.split() for line in printed(console).splitlines() if line.split()[:1] == [ARM]]
    assert found == [[ARM, *mode.split(), "16", "4", *["0.5", "±", "–"] * 5, "2.5"] for mode in ("in turn", "at once")]


def test_latency(console):
    rows = [
        {
            "arm": ARM,
            "depth": 0.1,
            "context": 4096,
            "edit_ms": 12.345,
            "speedup": 45.67,
            "floor_ms": 2.0,
            "of_floor": 6.2,
        }
    ]
    print_latency({"rows": rows, "growth": [{"arm": ARM, "depth": 0.1, "growth": 1.5}]}, console)
    found = [line.split() for line in printed(console).splitlines() if line.split()[:1] == [ARM]]
    assert found == [[ARM, "0.1", "4096", "12.3", "45.7", "2", "6.2"], [ARM, "0.1", "1.5"]]


def test_shared(console):
    arm = {
        "first_ms": 12.345, "next_ms_median": None, "all_ms": 2345.6, "tokens_written_first": 12,
        "tokens_written_all": 34, "tokens_in_use": 56,
    }  # fmt: skip
    print_shared({"arms": {ARM: arm}}, console)
    assert cells_of(console, ARM) == [ARM, "12.3", "–", "2346", "12", "34", "56"]
    for name in arm:
        assert name.split("_")[0] in printed(console)
