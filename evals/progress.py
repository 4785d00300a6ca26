"""How far a measurement is, for whoever shows a bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Progress = Callable[[int, int | None], None]
"""Called with what is done and with all there is to do, None where nobody knows."""


def silent(done: int, total: int | None) -> None:
    """Show nothing."""


def expected_traces(paths: Sequence[Path], limit: int | None = None) -> int | None:
    """Return how many traces there are, where the files tell it without being parsed: JSON lines, one trace a line.

    LangGraph histories hold several lines per trace, so this is a guess that may be too high.
    """
    total = 0
    for path in paths:
        if path.suffix.lower() != ".jsonl" or not path.is_file():
            return limit
        try:
            with path.open("rb") as file:
                total += sum(1 for line in file if line.strip())
        except OSError:  # to be told by the reader
            return limit
    return min(total, limit or total)
