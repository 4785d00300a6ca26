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
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(page, RESULTS) == page, "run `python -m kv_retract.evals.readme README.md`"
    assert [name for name in TABLES if block(name).partition("\n")[0] in page], "no table is marked in it"


def test_results_of_the_project_name_no_place():
    for file, _ in TABLES.values():
        text = (RESULTS / file).read_text(encoding="utf-8")
        assert "/home/" not in text and "/root" not in text and str(ROOT) not in text


@pytest.fixture
def results(tmp_path, sample_run):
    document = bench_edit(EditBench(context=64, span=8, repeats=1, model="random"))
    (tmp_path / "bench-edit.json").write_text(dump(document))
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
    data = json.loads((results / "bench-edit.json").read_text())
    _, *cells = rows(with_tables(block("bench-edit"), results))
    assert [cell[0] for cell in cells] == [f"`{arm}`" for arm in data["arms"]]
    for name, edit, share, step in cells:
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
        columns = ("n", "tokens_erased", "tokens_recomputed", "edit_ms_median", "next_step_ms_median")
        for shown, column in zip(cell[1:], columns, strict=True):
            assert float(shown) == pytest.approx(row[column], rel=0.006)
    assert "2 recorded airline threads" in page and "5 spans retracted (`tool_error` 3, `superseded` 2)" in page


def test_a_table_that_nobody_knows(results):
    with pytest.raises(TableError, match="unknown table 'nope'; known: bench-edit, replay"):
        with_tables(block("nope"), results)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_results_that_are_missing_or_broken(tmp_path, content):
    if content is not None:
        (tmp_path / "bench-edit.json").write_text(content)
    with pytest.raises(TableError, match="table 'bench-edit' needs 'bench-edit.json' in .*make results"):
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
