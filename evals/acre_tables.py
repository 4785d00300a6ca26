"""Tables of what a bi-layer cache is worth, from results files; `readme` puts them into pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .machine import machine_name
from .metrics import ALL
from .report import number, share


def acre_table(data: Mapping[str, Any]) -> str:
    """Return how often each arm is right by length, and at the longest by task, with its memory and its time."""
    config = data["config"]
    times, longest = config["times"], max(config["times"])
    by = {(row["arm"], row["task"], row["times_window"]): row for row in data["rows"]}
    columns = [f"{n} windows" for n in times] + [f"`{task}`" for task in config["tasks"]]
    lines = [
        f"| arm | {' | '.join(columns)} | device, MiB | to the first token, ms | tokens read again or brought back |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for arm in config["arms"]:
        chosen = [(ALL, n) for n in times] + [(task, longest) for task in config["tasks"]]
        cells, row = [share(by[arm, *place], "accuracy") for place in chosen], by[arm, ALL, longest]
        costs = (number(row[name]) for name in ("peak_device_mb", "ttft_ms_median", "tokens_refilled"))
        lines.append(f"| `{arm}` | {' | '.join((*cells, *costs))} |")
    machine, cost = config["machine"], data["refill_cost"]
    lines += [
        "",
        f"Share of answers that are exactly right: over all tasks at each length, then by task at {longest} windows, "
        f"like memory and time. Windows of {config['window']} tokens, split `{config['split']}`, {config['n']} threads "
        f"per task and length, up to {config['max_probes']} questions each, decoded greedily; model "
        f"`{config['model']}`, {config['dtype']}, {machine_name(machine)}. ± is one "
        "standard error.",
    ]
    if cost:
        lines[-1] += (
            f" Bringing {cost['tokens']} tokens back takes {cost['ratio']:.1%} of the time of reading them again."
        )
    return "\n".join(lines) + "\n"


def retraction_table(data: Mapping[str, Any]) -> str:
    """Return what is answered after a span of an old window was taken back, all tasks together."""
    lines = [
        "| windows | what is done | n | affected answers right | retracted answer still given | other answers right "
        "| ms | tokens through the model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in data["retraction"]:
        if row["task"] == ALL:
            shares = " | ".join(share(row, name) for name in ("affected_accuracy", "leak", "unaffected_accuracy"))
            costs = f"{number(row['edit_ms_median'])} | {number(row['tokens_recomputed'])}"
            lines.append(f"| {row['times_window']} | `{row['arm']}` | {row['n']} | {shares} | {costs} |")
    meaning = data["config"]["retraction_columns"]["arm"]
    return "\n".join([*lines, "", f"{meaning[0].upper()}{meaning[1:]}."]) + "\n"
