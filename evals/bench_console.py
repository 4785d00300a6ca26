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
    table = table_of("arm", "edit, ms", "quartiles", "of recompute", "least, ms", "times the least", "next step, ms")
    for name, arm in document["arms"].items():
        edit = arm["edit_ms"]
        table.add_row(
            Text(name),
            number(arm["edit_ms_median"]),
            f"{number(edit['low'])} to {number(edit['high'])}",
            f"{document['ratio_to_recompute'][name]:.2%}",
            number(arm["floor_ms"]),
            number(arm["of_floor"]),
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
    names = ("edit_ms", "speedup", "floor_ms", "of_floor")
    table = table_of(
        "arm", "depth", "context", "edit, ms", "times as fast as recompute", "least, ms", "times the least"
    )
    for row in document["rows"]:
        table.add_row(Text(row["arm"]), number(row["depth"]), str(row["context"]), *(number(row[n]) for n in names))
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


def print_step(document: Mapping[str, Any], console: Console) -> None:
    """Print the stages of a step by length of the thread, what is not the model, and the overhead of a session."""
    rows = document["rows"]
    table = table_of("stage, ms", *(f"{row['tokens']} tokens" for row in rows))
    for stage in rows[0]["stages_ms"]:
        cells = (f"{number(row['stages_ms'][stage])} ({row['shares'][stage]:.1%})" for row in rows)
        table.add_row(Text(stage), *cells)
    table.add_row("step", *(number(row["step_ms"]) for row in rows))
    table.add_row(
        "all but the model", *(f"{number(row['not_model_ms'])} ({row['not_model_share']:.1%})" for row in rows)
    )
    console.print(table)
    growth = document["growth"]
    console.print(
        f"From the shortest thread to the longest: {number(growth['tokens'])} times the tokens, "
        f"{number(growth['not_model_ms'])} times the time that is not the model's."
    )
    for name, cost in document["overhead"].items():
        console.print(
            f"A session with {name} adds {number(cost['overhead_ms'])} ms to a step at {cost['tokens']} tokens "
            f"({number(cost['bare_ms'])} ms without one); bound {number(cost['bound_ms'])} ms: "
            f"{'met' if cost['within'] else 'not met'}."
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


def print_radix(document: Mapping[str, Any], console: Console) -> None:
    """Print what a call and all calls of every index take, and how our index compares."""
    facts = document["workload"]
    console.print(
        f"{facts['threads']} threads, {facts['calls']} calls, pages of {document['page']}: "
        f"{facts['tokens_asked'] / 1e6:.1f} million tokens asked for, {facts['hit_rate']:.1%} of them found.",
        highlight=False,
    )
    columns = ("match", "lookup", "insert")
    table = table_of("index", *(f"{name}, us" for name in columns), "match, s", "insert, s")
    for name, row in {**document["cores"], "floor": document["floor"]}.items():
        cells = [f"{column}_us" for column in columns] + ["match_s", "insert_s"]
        table.add_row(Text(name), *(number(row[cell]["median"]) if cell in row else "" for cell in cells))
    console.print(table)
    table = table_of("time of kv_retract over that of", "match", "over lookup", "insert")
    for name, ratio in document["ratio_to"].items():
        table.add_row(Text(name), *(f"{ratio[column]:.3f}" if column in ratio else "" for column in columns))
    console.print(table)


def print_kernels(document: Mapping[str, Any], console: Console) -> None:
    """Print every kernel by size and arm."""
    print_limits(document, console)
    table = table_of("kernel", "tokens", "arm", "ms", "quartiles", "GB/s", "of a copy", "least, ms", "times the least")
    for row in document["rows"]:
        share = "" if row["of_copy"] is None else f"{row['of_copy']:.0%}"
        cells = (number(row["gb_per_s"]), share, number(row["floor_ms"]), number(row["of_floor"]))
        quartiles = f"{number(row['ms_low'])} to {number(row['ms_high'])}"
        table.add_row(row["kernel"], str(row["tokens"]), row["arm"], number(row["ms"]), quartiles, *cells)
    console.print(table)


def print_memory(document: Mapping[str, Any], console: Console) -> None:
    """Print what a thread and its forks hold."""
    table = table_of("open", "keys and values, MB", "besides, MB", "of one thread")
    for row in document["rows"]:
        sizes = (number(row[name] / 1e6) for name in ("kv_bytes", "host_bytes"))
        table.add_row(row["open"], *sizes, f"{row['ratio']:.3f}")
    console.print(table)
    console.print(
        f"{document['forks']} forks of {document['context']} tokens: {number(document['per_fork_bytes'])} bytes each; "
        f"their own {document['own_tokens']} tokens take {number(document['own_kv_bytes'] / 1e6)} MB.",
        highlight=False,
    )


def print_limits(document: Mapping[str, Any], console: Console) -> None:
    """Print what the device does at best."""
    limits, machine = document["limits"], document["machine"]
    console.print(
        f"{machine.get('accelerator', machine['processor'])}, {document['dtype']}: a copy moves "
        f"{number(limits['bytes_per_s'] / 1e9)} GB/s, a product does {number(limits['flops_per_s'] / 1e9)} GFLOP/s.",
        markup=False, highlight=False,
    )  # fmt: skip
