"""What the commands share: options, the progress bar, where output goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Dtype(StrEnum):
    """Of weights and cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Run = Callable[[Any], Any]
"""Takes what a progress bar is told with; returns a JSON-able document."""
Print = Callable[[Any, Any], None]
"""Takes that document and a console."""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]
Device = Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and cache.")]
SplitOption = Annotated[
    str, typer.Option("--split", help="train, or test with names and wordings that training never sees.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of random weights and random token ids.")]
Model = Annotated[
    str, typer.Option("--model", help="A name from `kv-retract models`, or a directory that transformers can load.")
]


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar on standard error while the block runs; nothing where that is no terminal."""
    terminal = Console(stderr=True)
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def console() -> Console:
    """Return where results are printed."""
    # Tables keep their columns where the output is a file or a pipe.
    return Console() if sys.stdout.isatty() else Console(width=160)


def now() -> str:
    """Return the time in UTC, for names of folders."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def show_document(run: Run, unit: str, show: Print, as_json: bool) -> None:
    """Run something under a progress bar and print what it returns, as JSON or as `show` does."""
    from ..evals.results import dump

    with progress_bar(unit) as tick:
        found = run(tick)
    if as_json:
        print(dump(found))
    else:
        show(found, console())
