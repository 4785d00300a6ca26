"""Tables in pages, written from results files: `python -m kv_retract.evals.readme README.md evals/results/README.md`.

A table stands between `<!-- table: NAME -->` and `<!-- end of NAME -->`; everything between is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kv_retract.errors import KVRetractError
from kv_retract.training.families import HELD_OUT

from .acre_tables import acre_table, retraction_table
from .bench_tables import edit_table, kernels_table, memory_table, radix_table, step_table
from .eraser_tables import (
    erasers_table,
    extraction_table,
    kinds_table,
    latency_table,
    repeated_table,
    sglang_table,
    shared_table,
)
from .machine import machine_name
from .report import number

_BLOCK = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of (?P=name) -->)", re.DOTALL)


class TableError(KVRetractError, ValueError):
    """A page asks for a table that nobody knows, or its results file is missing."""


def with_tables(page: str, results: Path) -> str:
    """Return a page with every marked table written anew.

    Args:
        page: Markdown.
        results: the folder of results files.

    Raises:
        TableError: a table has no writer, or its file is not there.
    """
    return _BLOCK.sub(lambda m: m["begin"] + _table(m["name"], results) + m["end"], page)


def _table(name: str, results: Path) -> str:
    if name not in TABLES:
        raise TableError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
    file, write = TABLES[name]
    try:
        return write(json.loads((results / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise TableError(f"table {name!r} needs {file!r} in {str(results)!r}: {error!r}; see `make results`") from error


_SHARES = ("recall", "precision", "exact")


def _replay(data: Mapping[str, Any]) -> str:
    counts, config = data["counts"], data["config"]
    found = ", ".join(f"`{policy}` {n}" for policy, n in counts["spans_by_policy"].items())
    lines = [
        f"{counts['traces']} recorded airline threads (tau-bench), {counts['steps']} steps: {counts['retractions']} "
        f"spans retracted ({found}).",
        "",
        "| eraser | n | KL, nats | tokens erased | tokens through the model | edit, ms | next step, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        if row["policy"] == "all":
            cells = ("n", "kl_mean", "tokens_erased", "tokens_recomputed", "edit_ms_median", "next_step_ms_median")
            lines.append(f"| `{row['arm']}` | {' | '.join(number(row[cell]) for cell in cells)} |")
    machine = config["machine"]
    lines += [
        "",
        f"Model `{config['model']}`, {config['dtype']}, {machine_name(machine)}. "
        "KL is from `recompute` over the next tokens of the trace; it and tokens are means per retraction step, times "
        "medians.",
    ]
    return "\n".join(lines) + "\n"


def _reference(data: Mapping[str, Any]) -> str:
    config, rows = data["config"], data["rows"]
    lengths = [str(length) for length in config["lengths"]]
    lines = [
        f"Share of answers that are exactly right on traces that never held the span, by length in tokens; split "
        f"`{config['split']}`, {config['n']} traces per family and length.",
        "",
        f"| family | {' | '.join(lengths)} |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for family in config["families"]:
        cells = (_pooled(rows, "accuracy", family=family, length=length, arm="clean") for length in config["lengths"])
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    trained = [row for row in rows if row["family"] != HELD_OUT]
    cells = [_pooled(trained, "accuracy", length=length, arm="clean") for length in config["lengths"]]
    below = [str(n) for n, cell in zip(config["lengths"], cells, strict=True) if float(cell.split()[0]) < 0.8]
    arms = ("none", "mask", "recompute")
    lines += [
        f"| all but `{HELD_OUT}` | {' | '.join(cells)} |",
        "",
        f"Over the families it was trained on, that is below 80 % from {below[0]} tokens on."
        if below
        else "Over the families it was trained on, that is 80 % or more at every length measured.",
        "",
        "Share of affected answers that are exactly the retracted one, all lengths together:",
        "",
        f"| family | span | n | {' | '.join(f'`{arm}`' for arm in arms)} |",
        "|---|---|---|---|---|---|",
    ]
    kinds = sorted({(row["family"], row["kind"]) for row in rows if row["kind"] != "clean"})
    for family, kind in sorted(kinds, key=lambda pair: (config["families"].index(pair[0]), pair[1])):
        chosen = [row for row in rows if row["family"] == family and row["kind"] == kind]
        n = sum(row["n"] for row in chosen if row["arm"] == "none")
        cells = (_pooled(chosen, "leak", arm=arm) for arm in arms)
        lines.append(f"| `{family}` | {kind.replace('_', ' ')} | {n} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Model `{config['model']}` ({config['num_parameters'] / 1e6:.1f} M parameters), {config['dtype']}, greedy; "
        "± is one standard error.",
    ]
    return "\n".join(lines) + "\n"


def _pooled(rows: Sequence[Mapping[str, Any]], column: str, **chosen: Any) -> str:
    """Return the mean of a column over the answers of some rows, with its standard error; their traces differ."""
    parts = [row for row in rows if all(row[name] == value for name, value in chosen.items())]
    n = sum(row["n"] for row in parts)
    if not n:
        return number(None)
    mean = sum(row["n"] * row[column] for row in parts) / n
    errors = [row[f"{column}_se"] for row in parts]
    if None in errors:  # of a row with one trace nobody knows it
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {sum((r['n'] * e) ** 2 for r, e in zip(parts, errors, strict=True)) ** 0.5 / n:.2f}"


def _policies(data: Mapping[str, Any]) -> str:
    """Return how often policies are right."""
    lines = ["| policy | labels of | threads | to find | found | right | exact |", "|---|---|---|---|---|---|---|"]
    for row in data["rows"]:
        shares = " | ".join(f"{number(row[name])} ± {number(row[f'{name}_se'])}" for name in _SHARES)
        counts = f"{row['threads']} | {row['labels']}"
        lines.append(f"| `{row['policy']}` | {row['source']} | {counts} | {shares} |")
    columns = data["config"]["columns"]
    lines += ["", f"Found: {columns['recall']}. Right: {columns['precision']}. Exact: {columns['exact']}.", ""]
    return "\n".join(lines)


def _heal(data: Mapping[str, Any]) -> str:
    lines = [
        "| tokens | next token, ms | with healing | while others heal | exact after, ms | KL steered | KL healed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        on, busy = (f"{row['ratio'][arm]:.3f} times" for arm in ("on", "busy"))
        cells = [number(row[name]) for name in ("healed_ms", "kl_steered", "kl_healed_max")]
        first = number(row["first_token_ms"]["off"])
        lines.append(f"| {row['context']} | {first} | {on} | {busy} | {' | '.join(cells)} |")
    machine, cost = data["machine"], data["overhead"]
    lines += [
        "",
        f"From the step in which a policy finds a span to its next token: medians of {data['rows'][0]['n']}, ratios "
        f"pair by pair, arms interleaved. KL healed: the largest, from a fresh prefill without the span. Model "
        f"`{data['model']}`, eraser `{data['eraser']}`, {machine_name(machine)}. An "
        f"ordinary step at {cost['tokens']} tokens ({cost['messages']} messages), with {len(cost['policies'])} "
        f"policies, a ledger file and an audit log, takes {number(cost['overhead_ms'])} ms more than rendering and "
        f"engine alone ({number(cost['bare_ms'])} ms).",
    ]
    return "\n".join(lines) + "\n"


def _cascade(data: Mapping[str, Any]) -> str:
    lines = [
        "| eraser | cascade | affected answers right | retracted answer still given | other answers right | found |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [
            f"{number(row[name])} ± {number(row[f'{name}_se'])}"
            for name in ("affected_accuracy", "leak", "unaffected_accuracy")
        ]
        lines.append(f"| `{row['arm']}` | `{row['cascade']}` | {' | '.join(cells)} | {number(row['quote_found'])} |")
    config = data["config"]
    tasks = ", ".join(f"`{task}`" for task in config["tasks"])
    lines += [
        "",
        f"The agent has given the answer once before the span is taken back. Tasks {tasks}, {config['n']} traces per "
        f"task and length ({', '.join(map(str, config['lengths']))} tokens), split `{config['split']}`; model "
        f"`{config['model']}`. ± is one standard error. Found: share of traces in which the cascade brought it.",
    ]
    return "\n".join(lines) + "\n"


TABLES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "bench-edit": ("bench/edit.json", edit_table),
    "bench-step": ("bench/step.json", step_table),
    "bench-radix": ("bench/radix.json", radix_table),
    "bench-kernels": ("bench/kernels.json", kernels_table),
    "bench-memory": ("bench/memory.json", memory_table),
    "replay": ("replay-tau-bench/metrics.json", _replay),
    "reference": ("reference/metrics.json", _reference),
    "reference-test": ("reference-test/metrics.json", _reference),
    "erasers": ("erasers/metrics.json", erasers_table),
    "erasers-default": ("erasers-default/metrics.json", erasers_table),
    "erasers-kinds": ("erasers/metrics.json", kinds_table),
    "erasers-documents": ("erasers-documents/metrics.json", erasers_table),
    "extraction": ("erasers/metrics.json", extraction_table),
    "heal": ("heal.json", _heal),
    "cascade": ("cascade/metrics.json", _cascade),
    "latency": ("bench/latency.json", latency_table),
    "latency-cuda": ("bench-cuda/latency.json", latency_table),
    "policies": ("policies/metrics.json", _policies),
    "repeated": ("repeated/metrics.json", repeated_table),
    "shared": ("shared.json", shared_table),
    "sglang": ("sglang.json", sglang_table),
    "acre": ("acre/metrics.json", acre_table),
    "acre-retraction": ("acre/metrics.json", retraction_table),
}
"""Name to results file and writer."""


def main() -> None:
    """Rewrite the tables of the pages named on the command line; results lie beside it or in `evals/results`."""
    for name in sys.argv[1:]:
        page = Path(name)
        results = page.parent / "evals" / "results"
        text = with_tables(page.read_text(encoding="utf-8"), results if results.is_dir() else page.parent)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
