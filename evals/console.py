"""Results as tables in a terminal. Texts of traces are printed without markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .excerpts import visible
from .metrics import ALL
from .report import number

if TYPE_CHECKING:
    from .replay import ReplayResult

MAX_PROBLEMS = 5
_APART = "overview"
"""The task that is not among all tasks (`acre_questions.OVERVIEW`)."""
_REPLAY_COLUMNS = ("n", "kl_mean", "kl_se", "top1", "tokens_erased", "tokens_recomputed", "edit_ms_median")


def print_replay(result: ReplayResult, console: Console) -> None:
    """Print the rows over all policies, what each policy found, and the first problems."""
    counts = result.counts
    console.print(
        f"{counts['traces']} traces, {counts['steps']} steps, {counts['retractions']} spans retracted, "
        f"{counts['too_long']} traces cut, {counts['unreadable']} not readable",
        highlight=False,
    )
    table = table_of("arm", *_REPLAY_COLUMNS, "next_step_ms_median", "cached_tokens")
    for row in result.rows:
        if row["policy"] == ALL:
            cells = [number(row[column]) for column in (*_REPLAY_COLUMNS, "next_step_ms_median", "cached_tokens")]
            table.add_row(Text(row["arm"]), *cells)
    console.print(table)
    found = ", ".join(f"{policy} {n}" for policy, n in result.spans_by_policy().items()) or "none"
    console.print(f"Spans by policy: {found}", markup=False, highlight=False)
    for problem in result.problems[:MAX_PROBLEMS]:
        console.print(visible(f"  {problem['source']}: {problem['message']}"), markup=False, highlight=False)
    if len(result.problems) > MAX_PROBLEMS:
        console.print(f"  and {len(result.problems) - MAX_PROBLEMS} more problems, listed in the report")
    if note := result.config["quality_note"]:
        console.print(Text(f"Note: {note}.", style="yellow"))


def print_reference(metrics: Mapping[str, Any], console: Console) -> None:
    """Print accuracy and leak of every family, kind, length and arm."""
    config = metrics["config"]
    console.print(
        f"Model {config['model']} ({config['num_parameters'] / 1e6:.1f} M parameters), split {config['split']}, "
        f"{config['n']} traces per family and length",
        markup=False, highlight=False,
    )  # fmt: skip
    table = table_of("family", "kind", "length", "arm", "n", "accuracy", "leak")
    for row in metrics["rows"]:
        figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in ("accuracy", "leak")]
        table.add_row(row["family"], row["kind"], str(row["length"]), row["arm"], str(row["n"]), *figures)
    console.print(table)


def print_policies(metrics: Mapping[str, Any], console: Console) -> None:
    """Print how often each policy is right, by where the labels come from."""
    shares, counts = ("recall", "precision", "exact"), ("threads", "labels", "proposals")
    table = table_of("policy", "source", *counts, *shares)
    for row in metrics["rows"]:
        figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in shares]
        table.add_row(Text(row["policy"]), row["source"], *(str(row[name]) for name in counts), *figures)
    console.print(table)


def print_erasers(metrics: Mapping[str, Any], console: Console) -> None:
    """Print every arm by length, and what can be got back."""
    config = metrics["config"]
    console.print(
        f"Model {config['model']}, split {config['split']}, {config['n']} traces per task and length; all together",
        markup=False, highlight=False,
    )  # fmt: skip
    shares = ("affected_accuracy", "leak", "unaffected_accuracy", "kl", "top1")
    costs = ("edit_ms_median", "next_step_ms_median", "tokens_recomputed")
    table = table_of("arm", "length", "n", *(name.replace("_", " ") for name in (*shares, *costs)))
    for row in metrics["rows"]:
        if row["task"] == row["span_length"] == row["depth"] == "all":
            figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in shares]
            cells = [str(row["length"]), str(row["n"]), *figures, *(number(row[name]) for name in costs)]
            table.add_row(Text(row["arm"]), *cells)
    console.print(table)
    table = table_of("arm", "n", "retracted answer likelier than a decoy", "retracted value extracted")
    for row in metrics["extraction"]:
        table.add_row(Text(row["arm"]), str(row["n"]), number(row["likelier"]), number(row["extracted"]))
    console.print(table)


def print_repeated(metrics: Mapping[str, Any], console: Console) -> None:
    """Print every arm, mode and number of edits."""
    names = ("affected_accuracy", "leak", "unaffected_accuracy", "kl", "top1")
    table = table_of("arm", "mode", "edits", "n", *(name.replace("_", " ") for name in names), "edits, ms")
    for row in metrics["rows"]:
        figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in names]
        table.add_row(Text(row["arm"]), row["mode"], str(row["edits"]), str(row["n"]), *figures, number(row["edit_ms"]))
    console.print(table)


def print_cascade(metrics: Mapping[str, Any], console: Console) -> None:
    """Print what is right and what is still given, by arm and cascade."""
    names = ("n", "affected_accuracy", "leak", "unaffected_accuracy", "derived", "quote_found")
    table = table_of("arm", "cascade", *(name.replace("_", " ") for name in names))
    for row in metrics["rows"]:
        table.add_row(Text(row["arm"]), row["cascade"], *(number(row[name]) for name in names))
    console.print(table)


def print_acre(metrics: Mapping[str, Any], console: Console) -> None:
    """Print every arm at every length, what is left after retractions, and what refilling costs."""
    config = metrics["config"]
    console.print(
        f"Model {config['model']}, split {config['split']}, windows of {config['window']} tokens, "
        f"{config['n']} threads per task and length",
        markup=False, highlight=False,
    )  # fmt: skip
    _print_shares(
        console, metrics["rows"], ("accuracy", "leak"),
        ("ttft_ms_median", "tokens_refilled", "peak_device_mb", "peak_host_mb"),
    )  # fmt: skip
    if metrics["retraction"]:
        _print_shares(
            console, metrics["retraction"], ("affected_accuracy", "leak", "unaffected_accuracy"),
            ("edit_ms_median", "tokens_recomputed"),
        )  # fmt: skip
    if cost := metrics["refill_cost"]:
        console.print(
            f"Bringing {cost['tokens']} tokens back: {number(cost['refill_ms'])} ms, {cost['ratio']:.1%} of the "
            f"{number(cost['encode_ms'])} ms of reading them again."
        )


def _print_shares(
    console: Console, rows: Iterable[Mapping[str, Any]], shares: Sequence[str], others: Sequence[str]
) -> None:
    """Print rows over all tasks, and those of the task that is not among them; shares with their errors."""
    table = table_of("arm", "task", "windows", "n", *(name.replace("_", " ") for name in (*shares, *others)))
    for row in rows:
        if row["task"] in (ALL, _APART):
            figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in shares]
            sizes = [row["task"], str(row["times_window"]), str(row["n"])]
            cells = [*sizes, *figures, *(number(row[name]) for name in others)]
            table.add_row(Text(row["arm"]), *cells)
    console.print(table)


def print_parts(kind: str, parts: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print what a registry holds: `{"name", "summary", "parameters": {name: default}}`."""
    table = table_of(kind, "what it does", "parameters", numbers=False)
    for part in parts:
        parameters = ", ".join(f"{name}={value}" for name, value in part["parameters"].items())
        table.add_row(Text(part["name"]), Text(part["summary"]), Text(parameters))
    console.print(table)


def table_of(first: str, *others: str, numbers: bool = True) -> Table:
    """Return an empty table with these columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    return table
