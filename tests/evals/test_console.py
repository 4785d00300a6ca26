import io
from dataclasses import replace

import pytest
from rich.console import Console

from kv_retract.evals.bench import EditBench, bench_edit
from kv_retract.evals.console import MAX_PROBLEMS, print_bench, print_parts, print_replay
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
