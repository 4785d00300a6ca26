"""Find out what a file holds, and read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import TraceError
from . import langgraph, openai, react, swe_agent
from .base import Trace, TraceProblem

_SUFFIXES = (".jsonl", ".json", ".traj", ".txt", ".log")
_KNOWN = (
    "chat messages (a list, or an object with messages or traj), LangGraph snapshots (values, config), "
    "SWE-agent (history), or a ReAct log (Thought 1, Action 1, Observation 1)"
)


def read_traces(path: str | PathLike[str]) -> Iterator[Trace | TraceProblem]:
    """Read a file, or all files with a known suffix below a folder, in the order of their names.

    A line or trace that cannot be read becomes a `TraceProblem` and the next ones go on; so does a whole file of a
    folder. JSON lines are read one at a time; a LangGraph history is collected to the end of its file.

    Args:
        path: `.jsonl`, `.json`, `.traj` or text, in UTF-8; the content decides on the format.

    Raises:
        TraceError: the path cannot be read, has no known format, or holds no trace. Raised while iterating.
    """
    place = Path(path)
    if not place.is_dir():
        yield from _file(place)
        return
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
        raise TraceError(f"expected files ending with {', '.join(_SUFFIXES)} in {str(place)!r}, got none")
    for file in files:
        try:
            yield from _file(file)
        except TraceError as error:
            yield TraceProblem(source=str(file), message=str(error))


def _file(path: Path) -> Iterator[Trace | TraceProblem]:
    try:
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as lines:
                yield from _lines(lines, path)
            return
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read {str(path)!r}: {error.strerror or error}; check path and permissions") from error
    text = _decode(data)
    if text is None:
        raise TraceError(f"expected text in UTF-8 in {str(path)!r}, got other bytes; convert the file")
    if text.lstrip()[:1] in ("{", "["):
        yield from _json(text, data, path)
    elif react.accepts(text):
        yield from react.read(text, str(path), path.stem)
    else:
        raise TraceError(f"unknown format of {str(path)!r}; expected {_KNOWN}")


def _json(text: str, data: bytes, path: Path) -> Iterator[Trace | TraceProblem]:
    value = _parse(text)
    if isinstance(value, _Malformed):
        # Several values, one a line, under another suffix than .jsonl; or one value that is broken.
        lines = data.splitlines()
        if len(lines) > 1 and not isinstance(_parse(lines[0].decode(errors="replace")), _Malformed):
            yield from _lines(lines, path)
        else:
            yield TraceProblem(source=str(path), message=value.message)
        return
    snapshots: list[tuple[Any, str]] = []
    try:
        found = list(_value(value, str(path), path.stem, snapshots))
    except TraceError as error:
        raise TraceError(f"unknown format of {str(path)!r}: {error}") from error
    yield from found
    yield from langgraph.read(snapshots)


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[Trace | TraceProblem]:
    snapshots: list[tuple[Any, str]] = []
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        empty = False
        source = f"{path}:{number}"
        text = _decode(line)
        value = _Malformed("expected UTF-8, got other bytes; convert the line") if text is None else _parse(text)
        if isinstance(value, _Malformed):
            yield TraceProblem(source=source, message=value.message)
            continue
        try:
            yield from _value(value, source, f"{path.stem}-{number}", snapshots)
        except TraceError as error:
            yield TraceProblem(source=source, message=str(error))
    yield from langgraph.read(snapshots)
    if empty:
        raise TraceError(f"expected JSON lines in {str(path)!r}, got an empty file")


def _value(
    value: Any, source: str, default_id: str, snapshots: list[tuple[Any, str]]
) -> Iterator[Trace | TraceProblem]:
    """Yield the traces of one JSON value; snapshots are put aside, as a history is more than one.

    Raises:
        TraceError: the value has no known form.
    """
    if langgraph.accepts(value):
        snapshots.append((value, source))
    elif swe_agent.accepts(value):
        yield from _one(lambda: swe_agent.read(value, source, default_id), source)
    elif openai.accepts(value):
        yield from _one(lambda: openai.read(value, source, default_id), source)
    elif isinstance(value, list) and any(_is_trace(item) for item in value):
        for number, item in enumerate(value):
            place = f"{source}[{number}]"
            try:
                yield from _value(item, place, f"{default_id}-{number}", snapshots)
            except TraceError as error:
                yield TraceProblem(source=place, message=str(error))
    else:
        got = f"an object with the keys {sorted(value)[:8]}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise TraceError(f"expected {_KNOWN}; got {got}")


def _is_trace(value: Any) -> bool:
    return langgraph.accepts(value) or swe_agent.accepts(value) or openai.accepts(value)


def _one(read: Callable[[], Trace], source: str) -> Iterator[Trace | TraceProblem]:
    try:
        yield read()
    except TraceError as error:
        yield TraceProblem(source=source, message=str(error))


class _Malformed:
    """Text that is not JSON, and what to tell about it."""

    def __init__(self, message: str) -> None:
        self.message = message


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return _Malformed("expected JSON, got values nested too deeply; the line is left out")
    except ValueError as error:
        return _Malformed(f"expected JSON, got {error}; repair or remove the line")


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
