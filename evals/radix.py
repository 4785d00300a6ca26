"""The prefix index under a server's load: what matching and indexing cost, beside SGLang's own trees."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from kv_retract.errors import KVRetractError

from .bench import BenchSettingError
from .machine import describe_machine, versions
from .progress import Progress, silent
from .radix_cores import FLOOR, MARK, OURS, Ours, measure
from .radix_workload import make_workload
from .stats import spread

_MODULE = "kv_retract.evals.radix_cores"
_TAIL = 2000
"""Characters of a failed program's output that its error tells."""


class RadixBenchError(KVRetractError, RuntimeError):
    """The environment with SGLang is missing, or the measurement in it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RadixBench:
    """What to time."""

    threads: int = 10_000
    """Agent threads; see `make_workload`."""
    repeats: int = 5
    seed: int = 0
    page: int = 1
    """Page size of the indexes."""
    venv: Path | None = None
    """Environment with SGLang and kv-retract; None: only our index is timed."""


def bench_radix(settings: RadixBench, *, progress: Progress = silent) -> dict[str, Any]:
    """Run one workload over every index, in one process, and return one JSON-able document.

    Counted is each call by itself, on keys and slots in the index's own form. `match`: until the slots of the longest
    prefix are there; in SGLang that is `match_prefix` and `path_device_indices`. `lookup`: of that SGLang's
    `match_prefix` alone, which tells the length and a node. `insert`: one path, with its slots. `COLUMN_s` is the
    sum over all calls, `COLUMN_us` the median call, both as a spread over the repetitions. All indexes have to find
    the same slots at every call.

    `floor`: what no index can leave out: one memcmp of the ids that are found, a copy of the slots that are handed
    out, and of the ids and slots that are new. `ratio_to`: our time over that of the others, sum over sum, the median
    over the repetitions; under `lookup` our match, slots included, over their lookup.

    Args:
        settings: what to time.
        progress: called with runs done and runs in all.

    Raises:
        BenchSettingError: there is no thread, no repetition, or no page.
        CoresDisagreeError: two indexes in this process found different prefixes.
        RadixBenchError: the environment is missing, or the program in it failed.
    """
    if min(settings.threads, settings.repeats, settings.page) < 1:
        raise BenchSettingError(
            f"expected at least one thread, one repetition and one token per page, got {settings.threads}, "
            f"{settings.repeats} and {settings.page}"
        )
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    if settings.venv is None:
        workload = make_workload(settings.threads, settings.seed)
        repeats = settings.repeats
        found = measure(workload, {OURS: Ours}, page_size=settings.page, repeats=repeats, progress=progress)
    else:
        found = _measure_in(settings.venv, settings, progress)
    times = found["times"]
    return {
        "cores": {name: _summary(columns) for name, columns in times.items() if name != FLOOR},
        "floor": _summary(times[FLOOR]),
        "ratio_to": {name: _ratios(times[OURS], columns) for name, columns in times.items() if name != OURS},
        "workload": found["workload"],
        "page": settings.page,
        "repeats": settings.repeats,
        "seed": settings.seed,
        "started_at": started_at,
        "machine": describe_machine("cpu"),
        "versions": found.get("versions") or versions(),
    }


def _measure_in(venv: Path, settings: RadixBench, progress: Progress) -> dict[str, Any]:
    """Measure with the Python of another environment."""
    python = venv / "bin" / "python"
    if not python.exists():
        raise RadixBenchError(f"expected an environment with SGLang and kv-retract, found no {str(python)!r}")
    given = {name: value for name, value in asdict(settings).items() if name != "venv"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        command = [str(python), "-m", _MODULE, json.dumps(given)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8") as process:
            try:
                told = _listen(process, progress)
            except BaseException:
                process.kill()
                raise
        if process.returncode or "times" not in told:
            log.seek(0)
            raise RadixBenchError(f"the measurement in {str(venv)!r} failed: {log.read()[-_TAIL:].strip()}")
    return told


def _listen(process: subprocess.Popen[str], progress: Progress) -> dict[str, Any]:
    """Pass progress on; return the last thing that the program told."""
    told: dict[str, Any] = {}
    assert process.stdout is not None, "it is a pipe"
    for line in process.stdout:
        if line.startswith(MARK):
            told = json.loads(line.removeprefix(MARK))
            if "done" in told:
                progress(told["done"], told["total"])
    return told


def _summary(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the spread of each column over the repetitions."""
    found = {name: spread(values) for name, values in columns.items()}
    return {name: asdict(value) for name, value in found.items() if value is not None}


def _ratios(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return our seconds over theirs, by what is compared."""
    pairs = {"match": "match_s", "lookup": "lookup_s", "insert": "insert_s"}
    mine = {"lookup": ours["match_s"], "match": ours["match_s"], "insert": ours["insert_s"]}
    return {
        name: float(np.median(np.divide(mine[name], theirs[column])))
        for name, column in pairs.items()
        if column in theirs
    }
