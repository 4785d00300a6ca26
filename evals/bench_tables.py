"""Tables of benchmarks, as Markdown, from their JSON documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .machine import machine_name
from .report import number


def edit_table(data: Mapping[str, Any]) -> str:
    """Return the edit of one long thread by eraser, and the least that it could take."""
    machine = machine_name(data["machine"])
    lines = [
        "| eraser | edit, ms (median) | of `recompute` | times the least | next step, ms |",
        "|---|---|---|---|---|",
    ]
    for arm, row in data["arms"].items():
        cells = (f"{data['ratio_to_recompute'][arm]:.2%}", number(row["of_floor"]), number(row["next_step_ms_median"]))
        lines.append(f"| `{arm}` | {number(row['edit_ms_median'])} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Erasing {data['span']} tokens at {data['depth']:.0%} depth of a thread of {data['context']}; model "
        f"`{data['model']}` ({data['num_parameters'] / 1e6:.1f} M random parameters), {data['dtype']}, "
        f"{machine}, torch {data['versions']['torch']}; {data['repeats']} repetitions, arms interleaved. The "
        f"least: bytes at the rate of a copy ({_rate(data['limits']['bytes_per_s'])}B/s), operations at that of a "
        f"matrix product ({_rate(data['limits']['flops_per_s'])}FLOP/s). A fork that goes on with "
        f"{data['next_tokens']} own tokens takes {data['fork_page_fraction']:.2%} of the thread's pages; "
        f"`match_prefix` on a path of 32K tokens takes {number(data['match_prefix_ms_32k'])} ms.",
    ]
    return "\n".join(lines) + "\n"


def step_table(data: Mapping[str, Any]) -> str:
    """Return a whole step by length: what is the model, and what is not."""
    machine = machine_name(data["machine"])
    rows = data["rows"]
    stages = [name for name in rows[0]["stages_ms"] if name != "model"]
    lines = [
        f"| stage, ms | {' | '.join(str(row['tokens']) + ' tokens' for row in rows)} |",
        "|---" * (len(rows) + 1) + "|",
        *(_stage(rows, name) for name in ("model", *stages)),
        f"| **not the model** | {' | '.join(format(row['not_model_share'], '.1%') for row in rows)} |",
        "",
    ]
    cost = data["overhead"]["all detectors"]
    lines.append(
        f"A step reads a tool result and decodes {data['answer']} tokens, through a session with "
        f"{len(cost['policies'])} detectors, a ledger file and an audit log, nothing to retract: medians of "
        f"{rows[0]['n']}, each stage without what it calls in others. Model `{data['model']}` "
        f"({data['num_parameters'] / 1e6:.1f} M parameters), {data['dtype']}, {machine}. At {cost['tokens']} "
        f"tokens ({cost['messages']} messages) the session adds {number(cost['overhead_ms'])} ms to a step of one "
        f"token that takes {number(cost['bare_ms'])} ms without it, and "
        f"{number(data['overhead']['no detectors']['overhead_ms'])} ms without detectors."
    )
    return "\n".join(lines) + "\n"


def _stage(rows: Any, name: str) -> str:
    cells = (f"{number(row['stages_ms'][name])} ({row['shares'][name]:.1%})" for row in rows)
    return f"| {name} | {' | '.join(cells)} |"


def radix_table(data: Mapping[str, Any]) -> str:
    """Return the prefix index beside SGLang's."""
    machine = machine_name(data["machine"])
    lines = [
        "| index | match, µs | insert, µs | kv_retract takes of its match | of its insert |",
        "|---|---|---|---|---|",
    ]
    for name, row in {**data["cores"], "floor": data["floor"]}.items():
        ratio = data["ratio_to"].get(name)
        shares = ("", "") if ratio is None else (f"{ratio[part]:.2f}" for part in ("match", "insert"))
        shown = "memcmp and memcpy alone" if name == "floor" else f"`{name}`"
        times = (number(row[part]["median"]) for part in ("match_us", "insert_us"))
        lines.append(f"| {shown} | {' | '.join((*times, *shares))} |")
    facts = data["workload"]
    lines += [
        "",
        f"{facts['threads']} agent threads with shared prefixes, {facts['calls']} calls, "
        f"{facts['tokens_asked'] / 1e6:.0f} M tokens asked for, {facts['hit_rate']:.0%} of them found; SGLang "
        f"{data['versions'].get('sglang', 'not measured')}, all in one process, in turns. Median call; shares are "
        f"of the time of all calls. A match ends where the slots are there. {machine}; {data['repeats']} "
        "repetitions.",
    ]
    return "\n".join(lines) + "\n"


def kernels_table(data: Mapping[str, Any]) -> str:
    """Return the kernels by size."""
    machine = machine_name(data["machine"])
    lines = ["| kernel | tokens | by | ms | of a copy's rate | times the least |", "|---|---|---|---|---|---|"]
    for row in data["rows"]:
        share = "–" if row["of_copy"] is None else f"{row['of_copy']:.0%}"
        cells = (row["arm"], number(row["ms"]), share, number(row["of_floor"]))
        lines.append(f"| `{row['kernel']}` | {row['tokens']} | {' | '.join(cells)} |")
    limits = data["limits"]
    lines += [
        "",
        f"A cache of {data['layers']} layers, {data['kv_heads']} KV heads of {data['head_dim']}, {data['dtype']}, "
        f"pages of {data['page_size']}, slots in random order; {machine}, where a copy moves "
        f"{_rate(limits['bytes_per_s'])}B/s. Medians of {data['repeats']}.",
    ]
    return "\n".join(lines) + "\n"


def memory_table(data: Mapping[str, Any]) -> str:
    """Return what forks weigh."""
    lines = ["| open | keys and values, MB | besides, MB | of one thread |", "|---|---|---|---|"]
    for row in data["rows"]:
        sizes = (number(row[part] / 1e6) for part in ("kv_bytes", "host_bytes"))
        lines.append(f"| {row['open']} | {' | '.join(sizes)} | {row['ratio']:.3f} |")
    lines += [
        "",
        f"{data['forks']} forks of a thread of {data['context']} tokens; then each goes on with {data['own_tokens']} "
        f"of its own, whose keys and values alone are {number(data['own_kv_bytes'] / 1e6)} MB.",
    ]
    return "\n".join(lines) + "\n"


def _rate(value: float) -> str:
    """Return a rate with its prefix: 12.5 G."""
    power = next((p for p in (12, 9, 6) if value >= 10**p), 0)
    return f"{number(value / 10**power)} {({12: 'T', 9: 'G', 6: 'M', 0: ''})[power]}"
