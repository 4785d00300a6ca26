"""What benchmarks measured, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from .console import table_of
from .report import number


def print_bench(document: Mapping[str, Any], console: Console) -> None:
    """Print the arms of an edit benchmark."""
    console.print(
        f"Erase {document['span']} of {document['context']} tokens at {document['depth']:.0%} depth; model "
        f"{document['model']}, {document['dtype']}, {document['machine']['processor']}, "
        f"{document['machine']['threads']} threads; median of {document['repeats']}",
        markup=False,
        highlight=False,
    )
    table = table_of("arm", "edit, ms", "quartiles", "of recompute", "next step, ms")
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


def print_latency(document: Mapping[str, Any], console: Console) -> None:
    """Print every arm at every length and depth, and how its cost grows."""
    table = table_of("arm", "depth", "context", "edit, ms", "times as fast as recompute")
    for row in document["rows"]:
        cells = (number(row["depth"]), str(row["context"]), number(row["edit_ms"]), number(row["speedup"]))
        table.add_row(Text(row["arm"]), *cells)
    console.print(table)
    table = table_of("arm", "depth", "longest over shortest")
    for row in document["growth"]:
        table.add_row(Text(row["arm"]), number(row["depth"]), number(row["growth"]))
    console.print(table)


def print_shared(document: Mapping[str, Any], console: Console) -> None:
    """Print what the edit cost the first thread and the others."""
    names = ("first_ms", "next_ms_median", "all_ms", "tokens_written_first", "tokens_written_all", "tokens_in_use")
    table = table_of("arm", *(name.replace("_", " ") for name in names))
    for arm, row in document["arms"].items():
        table.add_row(Text(arm), *(number(row[name]) for name in names))
    console.print(table)


def print_heal(document: Mapping[str, Any], console: Console) -> None:
    """Print the next token by arm, what healing took and changed, and the overhead of a session."""
    table = table_of("tokens", "off, ms", "on", "busy", "healed, ms", "tokens", "KL steered", "KL healed, most")
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
    table = table_of("tokens", "arm", "first token, ms", "withdrawal, ms", "times as fast as plain")
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
