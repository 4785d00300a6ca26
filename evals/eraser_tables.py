"""Tables of what erasers are worth, from results files; `readme` puts them into pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .machine import machine_name
from .report import number, share

LEARNED = "kveraser"
COMPARED = (LEARNED, "in_place")
"""Arms whose difference to full recomputation is told: the learned eraser, and the best that it could do."""


def erasers_table(data: Mapping[str, Any]) -> str:
    """Return every arm over all tasks and lengths, and the differences to full recomputation by length."""
    config = data["config"]
    lines = [
        "| eraser | affected answers right | retracted answer still given | other answers right | KL, nats "
        "| edit, ms | tokens through the model |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _overall(data["rows"]):
        shares = " | ".join(share(row, name) for name in ("affected_accuracy", "leak", "unaffected_accuracy"))
        costs = " | ".join(number(row[name]) for name in ("kl", "edit_ms_median", "tokens_recomputed"))
        lines.append(f"| {_name(row['arm'])} | {shares} | {costs} |")
    lines += [
        "",
        f"Split `{config['split']}`, tasks {', '.join(f'`{task}`' for task in config['tasks'])}, {config['n']} traces "
        f"per task and length ({', '.join(map(str, sorted(config['lengths'])))} tokens), one span each; model "
        f"`{config['model']}`, {config['dtype']}, {config['machine']['processor']}. ± is one standard "
        "error. KL and tokens are means, milliseconds medians.",
        "",
        "Difference to `recompute` on the same traces, in points, with bootstrap intervals of 95 %:",
        "",
        "| eraser | length | affected right | still given | others right |",
        "|---|---|---|---|---|",
    ]
    for row in data["paired"]:
        if row["arm"].startswith(COMPARED):
            cells = " | ".join(_points(row, name) for name in ("affected", "leak", "unaffected"))
            lines.append(f"| {_name(row['arm'])} | {row['length']} | {cells} |")
    return "\n".join(lines) + "\n"


def kinds_table(data: Mapping[str, Any]) -> str:
    """Return how often the retracted answer is still given, by kind of span."""
    arms = data["config"]["arms"]
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in data["rows"]:
        if row["task"] != "all":
            groups.setdefault((row["task"], row["kind"]), {}).setdefault(row["arm"], []).append(row)
    lines = [f"| task | span | n | {' | '.join(_name(arm) for arm in arms)} |", "|---" * (len(arms) + 3) + "|"]
    for (task, kind), by_arm in sorted(groups.items()):
        n = sum(row["n"] for row in by_arm[arms[0]])
        cells = (sum(r["n"] * r["leak"] for r in by_arm[arm]) / sum(r["n"] for r in by_arm[arm]) for arm in arms)
        lines.append(f"| `{task}` | {kind.replace('_', ' ')} | {n} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def extraction_table(data: Mapping[str, Any]) -> str:
    """Return whether the retracted text can be got back, by arm."""
    lines = ["| eraser | n | likelier than a decoy | value given when asked for the text |", "|---|---|---|---|"]
    for row in data["extraction"]:
        cells = " | ".join(share(row, name) for name in ("likelier", "extracted"))
        lines.append(f"| {_name(row['arm'])} | {row['n']} | {cells} |")
    return "\n".join(lines) + "\n"


def latency_table(data: Mapping[str, Any]) -> str:
    """Return the edit's cost by length, and its growth, at the deepest place measured."""
    depth, contexts = max(row["depth"] for row in data["rows"]), sorted({row["context"] for row in data["rows"]})
    rows = {(row["arm"], row["context"]): row for row in data["rows"] if row["depth"] == depth}
    growth = {row["arm"]: row["growth"] for row in data["growth"] if row["depth"] == depth}
    head = " | ".join(f"{context} tokens, ms (times as fast)" for context in contexts)
    lines = [f"| eraser | {head} | longest over shortest | times the least |", "|---" * (len(contexts) + 3) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in rows):
        cells = (f"{number(rows[arm, c]['edit_ms'])} ({number(rows[arm, c]['speedup'])})" for c in contexts)
        least = number(rows[arm, contexts[-1]]["of_floor"])
        lines.append(f"| {_name(arm)} | {' | '.join(cells)} | {growth[arm]:.2f} | {least} |")
    lines += [
        "",
        f"Erasing {data['span']} tokens at {depth:.0%} depth; model `{data['model']}` "
        f"({data['num_parameters'] / 1e6:.1f} M parameters), {data['dtype']}, {machine_name(data['machine'])}; "
        f"medians of {data['repeats']} repetitions, arms interleaved. The least, "
        "at the longest: bytes at the rate of a copy, operations at that of a matrix product.",
    ]
    return "\n".join(lines) + "\n"


def sglang_table(data: Mapping[str, Any]) -> str:
    """Return the next step after a withdrawal in a real server, by length and arm."""
    arms = list(next(iter(data["ttft_ms"].values())))
    lines = [f"| tokens | {' | '.join(f'`{arm}`' for arm in arms)} |", "|---" * (len(arms) + 1) + "|"]
    for length, first in data["ttft_ms"].items():
        cells = (
            f"{number(data['edit_ms'][length][arm])} + {number(first[arm])} "
            f"({number(data['speedup_vs_plain'][length][arm])})"
            for arm in arms
        )
        lines.append(f"| {length} | {' | '.join(cells)} |")
    ratio, hook, machine = data["ordinary_traffic_ratio"], data["ledger_hook_ms"], data["machine"]
    costs = ", ".join(f"{number(ms)} ms with {n}" for n, ms in hook.items())
    lines += [
        "",
        f"Milliseconds of the withdrawal and of the next step's first token (in brackets, how many times as fast as "
        f"`plain`); {data['span']} tokens at {data['depth']:.0%} depth, model `{data['model']}`, "
        f"{machine_name(machine)}, medians of {data['repeats']}. Ordinary traffic "
        f"runs at {number(ratio['median'])} ({number(ratio['min'])} to {number(ratio['max'])}) of its speed without "
        f"the plugin; arriving takes a request of 8192 tokens {costs} retractions in its thread.",
    ]
    return "\n".join(lines) + "\n"


def repeated_table(data: Mapping[str, Any]) -> str:
    """Return what is left of a thread after many edits, one after the other."""
    lines = [
        "| eraser | retractions | retracted facts unknown | still given | other facts told | KL over 512 tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        if row["mode"] == "in turn":
            shares = " | ".join(f"{row[name]:.2f}" for name in ("affected_accuracy", "leak", "unaffected_accuracy"))
            lines.append(f"| {_name(row['arm'])} | {row['edits']} | {shares} | {number(row['kl'])} |")
    return "\n".join(lines) + "\n"


def shared_table(data: Mapping[str, Any]) -> str:
    """Return what the edit of one document under many threads costs."""
    lines = ["| eraser | first thread, ms | each other, ms | all, ms | slots in use |", "|---|---|---|---|---|"]
    for arm, row in data["arms"].items():
        cells = (number(row[name]) for name in ("first_ms", "next_ms_median", "all_ms", "tokens_in_use"))
        lines.append(f"| {_name(arm)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{data['threads']} threads with {data['prefix']} tokens and a document of {data['span']} in common, and "
        f"{data['suffix']} of their own.",
    ]
    return "\n".join(lines) + "\n"


def _overall(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    columns = ("task", "length", "span_length", "depth")
    return [row for row in rows if all(row[column] == "all" for column in columns)]


def _name(arm: str) -> str:
    """Return an arm as the tables call it: `kveraser` with its variant."""
    if not arm.startswith(LEARNED):
        return f"`{arm}`"
    variant = re.search(r'variant="(\w+)"', arm)
    return f"`{LEARNED}`" + (f" {variant[1]}" if variant else "")


def _points(row: Mapping[str, Any], name: str) -> str:
    value, interval = row[name], row[f"{name}_ci"]
    if value is None:
        return number(None)
    around = "" if interval is None else f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return f"{100 * value:+.1f}{around}"
