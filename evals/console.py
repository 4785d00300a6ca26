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
    table = _table("arm", *_REPLAY_COLUMNS, "next_step_ms_median", "cached_tokens")
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


def print_bench(document: Mapping[str, Any], console: Console) -> None:
    """Print the arms of an edit benchmark."""
    console.print(
        f"Erase {document['span']} of {document['context']} tokens at {document['depth']:.0%} depth; model "
        f"{document['model']}, {document['dtype']}, {document['machine']['processor']}, "
        f"{document['machine']['threads']} threads; median of {document['repeats']}",
        markup=False,
        highlight=False,
    )
    table = _table("arm", "edit, ms", "quartiles", "of recompute", "next step, ms")
    for name, arm in document["arms"].items():
        edit = arm["edit_ms"]
        table.add_row(
            Text(name),
            number(arm["edit_ms_median"]),
            f"{number(edit['low'])} to {number(edit['high'])}",
            f"{document['ratio_to_recompute'][name]:.2%}",
            number(arm["next_step_ms_median"]),
        )
    console.print(table)
    console.print(
        f"A fork with {document['next_tokens']} tokens of its own takes {document['fork_page_fraction']:.2%} of the "
        f"thread's pages. match_prefix on 32K tokens: {number(document['match_prefix_ms_32k'])} ms.",
        highlight=False,
    )


def print_reference(metrics: Mapping[str, Any], console: Console) -> None:
    """Print accuracy and leak of every family, kind, length and arm."""
    config = metrics["config"]
    console.print(
        f"Model {config['model']} ({config['num_parameters'] / 1e6:.1f} M parameters), split {config['split']}, "
        f"{config['n']} traces per family and length",
        markup=False, highlight=False,
    )  # fmt: skip
    table = _table("family", "kind", "length", "arm", "n", "accuracy", "leak")
    for row in metrics["rows"]:
        figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in ("accuracy", "leak")]
        table.add_row(row["family"], row["kind"], str(row["length"]), row["arm"], str(row["n"]), *figures)
    console.print(table)


def print_policies(metrics: Mapping[str, Any], console: Console) -> None:
    """Print how often each policy is right, by where the labels come from."""
    shares, counts = ("recall", "precision", "exact"), ("threads", "labels", "proposals")
    table = _table("policy", "source", *counts, *shares)
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
    table = _table("arm", "length", "n", *(name.replace("_", " ") for name in (*shares, *costs)))
    for row in metrics["rows"]:
        if row["task"] == row["span_length"] == row["depth"] == "all":
            figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in shares]
            cells = [str(row["length"]), str(row["n"]), *figures, *(number(row[name]) for name in costs)]
            table.add_row(Text(row["arm"]), *cells)
    console.print(table)
    table = _table("arm", "n", "retracted answer likelier than a decoy", "retracted value extracted")
    for row in metrics["extraction"]:
        table.add_row(Text(row["arm"]), str(row["n"]), number(row["likelier"]), number(row["extracted"]))
    console.print(table)


def print_repeated(metrics: Mapping[str, Any], console: Console) -> None:
    """Print every arm, mode and number of edits."""
    names = ("affected_accuracy", "leak", "unaffected_accuracy", "kl", "top1")
    table = _table("arm", "mode", "edits", "n", *(name.replace("_", " ") for name in names), "edits, ms")
    for row in metrics["rows"]:
        figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in names]
        table.add_row(Text(row["arm"]), row["mode"], str(row["edits"]), str(row["n"]), *figures, number(row["edit_ms"]))
    console.print(table)


def print_latency(document: Mapping[str, Any], console: Console) -> None:
    """Print every arm at every length and depth, and how its cost grows."""
    table = _table("arm", "depth", "context", "edit, ms", "times as fast as recompute")
    for row in document["rows"]:
        cells = (number(row["depth"]), str(row["context"]), number(row["edit_ms"]), number(row["speedup"]))
        table.add_row(Text(row["arm"]), *cells)
    console.print(table)
    table = _table("arm", "depth", "longest over shortest")
    for row in document["growth"]:
        table.add_row(Text(row["arm"]), number(row["depth"]), number(row["growth"]))
    console.print(table)


def print_shared(document: Mapping[str, Any], console: Console) -> None:
    """Print what the edit cost the first thread and the others."""
    names = ("first_ms", "next_ms_median", "all_ms", "tokens_written_first", "tokens_written_all", "tokens_in_use")
    table = _table("arm", *(name.replace("_", " ") for name in names))
    for arm, row in document["arms"].items():
        table.add_row(Text(arm), *(number(row[name]) for name in names))
    console.print(table)


def print_cascade(metrics: Mapping[str, Any], console: Console) -> None:
    """Print what is right and what is still given, by arm and cascade."""
    names = ("n", "affected_accuracy", "leak", "unaffected_accuracy", "derived", "quote_found")
    table = _table("arm", "cascade", *(name.replace("_", " ") for name in names))
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
    table = _table("arm", "task", "windows", "n", *(name.replace("_", " ") for name in (*shares, *others)))
    for row in rows:
        if row["task"] in (ALL, _APART):
            figures = [f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in shares]
            sizes = [row["task"], str(row["times_window"]), str(row["n"])]
            cells = [*sizes, *figures, *(number(row[name]) for name in others)]
            table.add_row(Text(row["arm"]), *cells)
    console.print(table)


def print_heal(document: Mapping[str, Any], console: Console) -> None:
    """Print the next token by arm, what healing took and changed, and the overhead of a session."""
    table = _table("tokens", "off, ms", "on", "busy", "healed, ms", "tokens", "KL steered", "KL healed, most")
    for row in document["rows"]:
        ratio, cells = row["ratio"], ("healed_ms", "healed_tokens", "kl_steered", "kl_healed_max")
        first = (number(row["first_token_ms"]["off"]), *(f"{ratio[arm]:.3f}x" for arm in ("on", "busy")))
        table.add_row(str(row["context"]), *first, *(number(row[cell]) for cell in cells))
    console.print(table)
    cost = document["overhead"]
    console.print(
        f"An ordinary step at {cost['tokens']} tokens: {number(cost['bare_ms'])} ms without a session, "
        f"{number(cost['overhead_ms'])} ms more with one."
    )


def print_sglang(document: Mapping[str, Any], console: Console) -> None:
    """Print the next step after a withdrawal by length and arm, and what ordinary traffic pays."""
    table = _table("tokens", "arm", "first token, ms", "withdrawal, ms", "times as fast as plain")
    for length, arms in document["ttft_ms"].items():
        for arm, first in arms.items():
            edit, speedup = (document[name][length][arm] for name in ("edit_ms", "speedup_vs_plain"))
            table.add_row(length, Text(arm), number(first), number(edit), number(speedup))
    console.print(table)
    ratio = document["ordinary_traffic_ratio"]
    low, middle, high = (number(ratio[name]) for name in ("min", "median", "max"))
    console.print(f"Ordinary traffic with the plugin: {middle} of the speed without it ({low} to {high}).")
    costs = ", ".join(f"{number(ms)} ms at {n}" for n, ms in document["ledger_hook_ms"].items())
    console.print(f"Arrival of a request by retractions of its thread: {costs}.")


def print_parts(kind: str, parts: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print what a registry holds: `{"name", "summary", "parameters": {name: default}}`."""
    table = _table(kind, "what it does", "parameters", numbers=False)
    for part in parts:
        parameters = ", ".join(f"{name}={value}" for name, value in part["parameters"].items())
        table.add_row(Text(part["name"]), Text(part["summary"]), Text(parameters))
    console.print(table)


def _table(first: str, *others: str, numbers: bool = True) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    return table
