import json
import sys
from pathlib import Path

import pytest

from kv_retract.evals import readme
from kv_retract.evals.bench import EditBench, bench_edit
from kv_retract.evals.readme import TABLES, TableError, with_tables
from kv_retract.evals.results import dump

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "evals" / "results"


def block(name, body=""):
    return f"<!-- table: {name} -->\n{body}<!-- end of {name} -->"


def test_the_readme_says_what_the_results_say():
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "evals/results/README.md")]
    assert [with_tables(page, RESULTS) for page in pages] == pages, "run `make tables`"
    for name in TABLES:
        assert any(block(name).partition("\n")[0] in page for page in pages), f"{name} is marked in none"


def test_results_of_the_project_name_no_place():
    for file, _ in TABLES.values():
        text = (RESULTS / file).read_text(encoding="utf-8")
        assert "/home/" not in text and "/root" not in text and str(ROOT) not in text


@pytest.fixture
def results(tmp_path, sample_run):
    document = bench_edit(EditBench(context=64, span=8, repeats=1, model="random"))
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "edit.json").write_text(dump(document))
    (tmp_path / "replay-tau-bench").mkdir()
    (tmp_path / "replay-tau-bench" / "metrics.json").write_text((sample_run[0] / "metrics.json").read_text())
    return tmp_path


def rows(page):
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]


def test_tables_are_replaced_and_the_rest_stays(results):
    page = f"# Title\n\n{block('bench-edit', 'old | text' + chr(10))}\nbetween\n{block('replay')}\nend \\1\n"
    found = with_tables(page, results)
    assert found.startswith("# Title\n\n<!-- table: bench-edit -->\n| eraser |") and found.endswith("\nend \\1\n")
    assert "old | text" not in found and "\nbetween\n" in found
    assert with_tables(found, results) == found


def test_figures_of_the_edit_benchmark(results):
    data = json.loads((results / "bench" / "edit.json").read_text())
    _, *cells = rows(with_tables(block("bench-edit"), results))
    assert [cell[0] for cell in cells] == [f"`{arm}`" for arm in data["arms"]]
    for name, edit, share, _, step in cells:
        arm = data["arms"][name.strip("`")]
        assert float(edit) == pytest.approx(arm["edit_ms_median"], rel=0.006)
        assert float(step) == pytest.approx(arm["next_step_ms_median"], rel=0.006)
        assert float(share.rstrip("%")) / 100 == pytest.approx(data["ratio_to_recompute"][name.strip("`")], abs=1e-4)
    assert cells[-1][0] == "`recompute`" and cells[-1][2] == "100.00%"


def test_figures_of_the_replay(results, sample_run):
    page = with_tables(block("replay"), results)
    _, *cells = rows(page)
    overall = [row for row in sample_run[1].rows if row["policy"] == "all"]
    assert [cell[0] for cell in cells] == [f"`{row['arm']}`" for row in overall]
    for cell, row in zip(cells, overall, strict=True):
        columns = ("n", "kl_mean", "tokens_erased", "tokens_recomputed", "edit_ms_median", "next_step_ms_median")
        for shown, column in zip(cell[1:], columns, strict=True):
            assert float(shown) == pytest.approx(row[column], rel=0.006)
    assert "2 recorded airline threads" in page and "5 spans retracted (`tool_error` 3, `superseded` 2)" in page


def cell(family, kind, arm, n, accuracy, leak=None, length=256, se=0.1):
    return {
        "family": family, "kind": kind, "length": length, "arm": arm, "n": n, "accuracy": accuracy, "accuracy_se": se,
        "leak": leak, "leak_se": None if leak is None else se,
    }  # fmt: skip


def reference_results(second_length):
    arms = {"none": 0.9, "mask": 0.5, "recompute": 0.0}
    rows = [cell("facts", "clean", "clean", 10, 1.0), cell("documents", "clean", "clean", 10, 0.2)]
    rows.append(cell("facts", "clean", "clean", 30, second_length, length=512))
    rows += [cell("facts", "tool_result", arm, 10, 0.1, leak, se=None) for arm, leak in arms.items()]
    rows += [cell("facts", "tool_result", arm, 30, 0.1, leak / 3, length=512, se=None) for arm, leak in arms.items()]
    config = {"families": ["facts", "documents"], "lengths": [256, 512], "split": "train", "n": 4, "model": "m"}
    return {"config": {**config, "num_parameters": 3_300_000, "dtype": "float32"}, "rows": rows}


def test_figures_of_the_reference_model(tmp_path):
    (tmp_path / "reference").mkdir()
    for second, told in ((0.7, "below 80 % from 512 tokens on"), (0.9, "80 % or more at every length")):
        (tmp_path / "reference" / "metrics.json").write_text(json.dumps(reference_results(second)))
        page = with_tables(block("reference"), tmp_path)
        found = rows(page)
        assert found[0] == ["family", "256", "512"]
        assert found[1] == ["`facts`", "1.00 ± 0.10", f"{second:.2f} ± 0.10"]
        assert found[2] == ["`documents`", "0.20 ± 0.10", "–"], "nothing was measured there"
        assert found[3] == ["all but `documents`", *found[1][1:]]
        assert told in page and "3.3 M" in page
        assert found[-1] == ["`facts`", "tool result", "40", "0.45", "0.25", "0.00"], "weighted by answers"


def test_standard_errors_of_pooled_rows():
    parts = [cell("facts", "clean", "clean", 10, 1.0, se=0.3), cell("facts", "clean", "clean", 30, 0.5, se=0.1)]
    assert readme._pooled(parts, "accuracy") == f"0.62 ± {(3**2 + 3**2) ** 0.5 / 40:.2f}"


def test_a_table_that_nobody_knows(results):
    with pytest.raises(TableError, match="unknown table 'nope'; known: bench-edit, bench-step"):
        with_tables(block("nope"), results)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_results_that_are_missing_or_broken(tmp_path, content):
    if content is not None:
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "edit.json").write_text(content)
    with pytest.raises(TableError, match="table 'bench-edit' needs 'bench/edit.json' in .*make results"):
        with_tables(block("bench-edit"), tmp_path)


def test_a_page_without_tables_is_left_alone(tmp_path):
    page = "<!-- table: bench-edit -->\nnever closed\n<!-- end of replay -->"
    assert with_tables(page, tmp_path) == page


def test_pages_are_rewritten_in_place(results, tmp_path, monkeypatch):
    place = tmp_path / "project"
    (place / "evals").mkdir(parents=True)
    (place / "evals" / "results").symlink_to(results)
    (place / "README.md").write_text(block("replay"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["readme", str(place / "README.md")])
    readme.main()
    assert (place / "README.md").read_text(encoding="utf-8") == with_tables(block("replay"), results)


def long_row(arm, task, times, accuracy, **more):
    return {
        "arm": arm, "task": task, "times_window": times, "accuracy": accuracy, "accuracy_se": 0.05,
        "peak_device_mb": 12.5, "ttft_ms_median": 31.4, "tokens_refilled": 512.0, **more,
    }  # fmt: skip


@pytest.fixture
def long_results(tmp_path):
    arms, tasks, times = ("bm25", "acre:ratio=16"), ("facts", "updates"), (2, 8)
    rows = [
        long_row(arm, task, n, 0.5 + 0.1 * number + 0.01 * n)
        for arm in arms for number, task in enumerate(("all", *tasks)) for n in times
    ]  # fmt: skip
    taken = {"affected_accuracy": 0.75, "leak": 0.0, "unaffected_accuracy": None, "edit_ms_median": 90.0}
    taken |= {f"{name}_se": None if value is None else 0.1 for name, value in taken.items()}
    config = {
        "arms": arms, "tasks": tasks, "times": times, "window": 1024, "split": "train", "n": 4, "max_probes": 4,
        "model": "reference", "dtype": "float32", "machine": {"processor": "a CPU", "threads": 2},
        "retraction_columns": {"arm": "none: nothing is taken back"},
    }  # fmt: skip
    data = {
        "rows": rows, "config": config, "refill_cost": {"tokens": 512, "ratio": 0.056},
        "retraction": [
            {"arm": "both", "task": task, "times_window": 8, "n": 16, "tokens_recomputed": 2048.0, **taken}
            for task in ("all", "facts")
        ],
    }  # fmt: skip
    (tmp_path / "acre").mkdir()
    (tmp_path / "acre" / "metrics.json").write_text(json.dumps(data))
    return tmp_path


def test_figures_of_long_threads(long_results):
    page = with_tables(block("acre"), long_results)
    head, *cells = rows(page)
    assert head[:5] == ["arm", "2 windows", "8 windows", "`facts`", "`updates`"]
    assert cells[0] == [
        "`bm25`",
        "0.520 ± 0.050",
        "0.580 ± 0.050",
        "0.680 ± 0.050",
        "0.780 ± 0.050",
        "12.5",
        "31.4",
        "512",
    ]
    assert [row[0] for row in cells] == ["`bm25`", "`acre:ratio=16`"]
    assert "takes 5.6% of the time of reading them again" in page


def test_figures_of_retractions_in_long_threads(long_results):
    page = with_tables(block("acre-retraction"), long_results)
    _, *cells = rows(page)
    assert cells == [["8", "`both`", "16", "0.750 ± 0.100", "0.000 ± 0.100", "–", "90", "2048"]]
    assert page.endswith("None: nothing is taken back.\n<!-- end of acre-retraction -->")
