"""One HTML page that tells a whole replay: tables, plots, and every span that was taken back. Needs no other file.

Traces hold text of attackers. Every value is escaped (Jinja2's autoescape), invisible characters are shown by their
names (`excerpts.visible`), and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .excerpts import visible
from .metrics import ALL, COLUMNS
from .plots import cost_plot, divergence_plot

if TYPE_CHECKING:
    from .replay import ReplayResult

MAX_SPANS = 2000
"""Longest list of retracted spans on a page; `samples.jsonl` has all steps."""
MAX_PROBLEMS = 500
"""Longest list of problems on a page; `metrics.json` has all."""


def report_html(result: ReplayResult) -> str:
    """Return the page; its figures are those of `metrics.json`."""
    own = [sample for sample in result.samples if sample.own_edit]
    overall = [row for row in result.rows if row["policy"] == ALL]
    others = [arm for arm in result.config["arms"] if arm != result.config["reference"]]
    arms = [*others, result.config["reference"]]
    return (
        environment()
        .get_template("report.html")
        .render(
            result=result,
            config=result.config,
            tables=_tables(result),
            columns={"arm": "the eraser", **COLUMNS},
            divergence=divergence_plot(own, overall, others) if own and others else "",
            cost=cost_plot(own, arms) if own else "",
            spans=result.retracted[:MAX_SPANS],
            num_hidden=max(0, len(result.retracted) - MAX_SPANS),
            problems=result.problems[:MAX_PROBLEMS],
            num_hidden_problems=max(0, len(result.problems) - MAX_PROBLEMS),
        )
    )


def environment() -> Environment:
    """Return the templates of this folder: escaping is on for all of them, an unknown name is an error."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    found.filters["number"] = number
    found.filters["visible"] = lambda value: visible(str(value))
    return found


def number(value: Any) -> str:
    """Write a figure for people: three significant digits, a dash where nothing was scored."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def share(row: Mapping[str, Any], column: str) -> str:
    """Write a share of a row with its standard error."""
    value, error = row[column], row[f"{column}_se"]
    return number(None) if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _tables(result: ReplayResult) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of each policy, over all policies first."""
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in result.rows:
        tables.setdefault(row["policy"], []).append(row)
    return tables
