"""Results folders: written beside their place and moved there whole, never overwritten."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kv_retract.errors import KVRetractError, OutputExistsError


class OutputError(KVRetractError, OSError):
    """Results cannot be written where the caller wants them."""


@contextmanager
def results_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends; an exception leaves nothing behind.

    Raises:
        OutputExistsError: `out` is a file or a folder with something in it, now or at the end.
        OutputError: nothing can be written there.
    """
    # In the same folder, so that the move is one rename on one file system.
    draft = out.parent / f".{out.name}.{secrets.token_hex(4)}"
    with _writable(out):
        check_free(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    try:
        yield draft
        try:
            draft.rename(out)
        except OSError as error:
            raise _exists(out) from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_free(out: Path) -> None:
    """Raise OutputExistsError where `out` is a file, a link, or a folder with something in it."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise _exists(out)


def check_new(out: Path) -> None:
    """Raise OutputExistsError where `out` is anything, OutputError where it cannot be looked at."""
    with _writable(out):
        if out.is_symlink() or out.exists():
            raise _exists(out)


def write_new_json(out: Path, value: Any) -> None:
    """Write one JSON document to a new file.

    Raises:
        OutputExistsError: the file is there.
        OutputError: nothing can be written there.
    """
    text = dump(value, indent=2) + "\n"
    with _writable(out):
        check_new(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as file:
            file.write(text)


def write_new_lines(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line to a new file, whole or not at all.

    Raises:
        OutputExistsError: the file is there.
        OutputError: it cannot be written.
    """
    check_new(out)
    with _writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.parent / f".{out.name}.{secrets.token_hex(4)}"
        try:
            write_jsonl(draft, rows)
            draft.rename(out)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document."""
    path.write_text(dump(value, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(dump(row) + "\n")


def dump(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON in ASCII: infinities become text, NaN (not scored) becomes null."""
    return json.dumps(_strict(value), indent=indent, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except KVRetractError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write results to {str(out)!r}: {error.strerror or error}; choose another place"
        ) from error


def _exists(out: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{str(out)!r} is there already and results are never overwritten; choose another place, or remove it first"
    )
