"""Commands that read an audit log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from ..audit import read
from ..audit import verify as verify_log
from .common import Json, console

app = typer.Typer(no_args_is_help=True, help="Read the log of what was taken back, by whom and why.")
_Log = Annotated[Path, typer.Argument(metavar="FILE", help="The audit log; it may be in use.")]
_COLUMNS = ("when", "who", "thread", "what", "policy", "reason", "guarantee", "status", "cost", "divergence")


@app.command()
def verify(
    file: _Log,
    head: Annotated[
        str | None,
        typer.Option(help="Hash that an earlier check printed: tells also whether entries were cut from the end."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that no entry was changed, removed or put elsewhere. Exits with 2 where one was."""
    from ..evals.results import dump

    verified = verify_log(file, head=head)
    if as_json:
        print(dump(asdict(verified)))
        return
    print(f"entries: {verified.entries}")
    print(f"first:   {verified.first_at}")
    print(f"last:    {verified.last_at}")
    print(f"head:    {verified.head}")
    if verified.clock_steps:
        print(
            f"{verified.clock_steps} with an earlier time than the one before: a clock was set, or writers overlapped"
        )
    if verified.torn_bytes:
        print(
            f"The last line is unfinished ({verified.torn_bytes} bytes): its writing was interrupted. That is no sign "
            "of tampering; the next entry takes its place and notes it."
        )


@app.command()
def show(
    file: _Log,
    thread: Annotated[str | None, typer.Option(help="Only the entries of this thread.")] = None,
    as_json: Json = False,
) -> None:
    """Show the entries, checked as by `verify`: a line per span, edit and change."""
    from ..evals.excerpts import visible
    from ..evals.results import dump

    entries = [entry for entry in read(file) if thread is None or entry.get("thread_id") == thread]
    if as_json:
        print(dump(entries))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column == "when")
    for row in _rows(entries):
        table.add_row(*(Text(visible(row.get(column, ""))) for column in _COLUMNS))
    console().print(table)


def _rows(entries: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for entry in entries:
        common = {
            "when": entry["at"],
            "who": entry.get("actor", ""),
            "thread": entry.get("thread_id", ""),
            "what": " ".join((entry["event"].replace("_", " "), *entry.get("retraction_ids", ()))),
            "divergence": _divergence(entry.get("divergence")),
        }
        match entry["event"]:
            case "decided":
                for span in entry["spans"]:
                    taken = {name: span[name] for name in ("policy", "reason", "guarantee", "status")}
                    yield {**common, "what": f"decided {span['retraction_id']}", **taken}
            case "erased":
                yield {**common, "cost": _cost(entry["cost"])}
            case "status_changes":
                what, status = f"{entry['why']} {entry['retraction_id']}", f"{entry['before']} to {entry['after']}"
                yield {**common, "what": what, "status": status}
            case "healed":
                yield {**common, "cost": f"{entry['tokens']} tokens recomputed, {entry['waited_s']:.1f} s after"}
            case "policies_failed":
                for failure in entry["failures"]:
                    yield {**common, "what": f"policy {failure['kind']}", "policy": failure["policy"]}
            case "recovered":
                yield {**common, "what": f"recovered: an unfinished line of {entry['torn_bytes']} bytes was cut off"}
            case _:
                yield common


def _cost(cost: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{cost[f'tokens_{name}']} {name}" for name in ("erased", "recomputed", "moved"))
    return f"{counts} in {cost['edit_ms']:.1f} ms"


def _divergence(divergence: Mapping[str, Any] | None) -> str:
    return f"KL {float(divergence['kl']):.3g}, top-1 {float(divergence['top1']):.0%}" if divergence else ""
