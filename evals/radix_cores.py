"""Prefix indexes on one workload, in one process: ours, and SGLang's where it is installed.

Run as a program by the Python of an environment with SGLang and kv-retract; prints lines of JSON. SGLang's caches have
no pools here: nothing is evicted, and what would go back to a pool is let go.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from kv_retract.cache.base import IntArray
from kv_retract.cache.radix import RadixCache
from kv_retract.errors import KVRetractError

from .machine import versions
from .progress import Progress, silent
from .radix_workload import Workload, make_workload

OURS = "kv_retract"
SGLANG = ("sglang python", "sglang rust", "sglang radix_cache")
"""`UnifiedRadixCache` with either tree core, and the separate `RadixCache`."""
FLOOR = "floor"
MARK = "RADIX "
"""What the program's lines begin with: SGLang prints others."""
_COLUMNS = ("match", "lookup", "insert")


class CoresDisagreeError(KVRetractError, RuntimeError):
    """Two indexes found different prefixes."""


class Core(ABC):
    """An empty index, with keys and slots in its own form. Only `lookup`, `gather` and `insert` are timed."""

    lookup: Callable[[Any], Any]
    """Takes what `asked` returns; finds the longest prefix."""
    insert: Callable[..., Any]
    """Takes what `given` returns."""
    gathers = True
    """Whether `gather` does any work: otherwise `lookup` is the whole match."""

    @abstractmethod
    def asked(self, ids: IntArray) -> Any:
        """Return the argument of `lookup`."""

    @abstractmethod
    def given(self, ids: IntArray, slots: IntArray, matched: int) -> tuple[Any, ...]:
        """Return the arguments of `insert`."""

    @abstractmethod
    def gather(self, found: Any) -> Any:
        """Return the slots of what `lookup` found."""

    def known(self, inserted: Any) -> int:
        """Return how many entries `insert` found indexed."""
        known: int = inserted.prefix_len
        return known


class Ours(Core):
    """`RadixCache`: its `match_prefix` returns the slots."""

    gathers = False

    def __init__(self, page_size: int) -> None:
        index = RadixCache(page_size)
        self.lookup, self.insert = index.match_prefix, index.insert

    def asked(self, ids: IntArray) -> IntArray:
        """A copy: what others are asked with was just made as well."""
        return ids.copy()

    def given(self, ids: IntArray, slots: IntArray, matched: int) -> tuple[IntArray, IntArray]:
        """Return ids and slots."""
        return ids.copy(), slots

    def gather(self, found: Any) -> Any:
        """Return them as they are."""
        return found.slots

    def known(self, inserted: Any) -> int:
        """Return it as it is."""
        known: int = inserted
        return known


class _NoPool:
    """Stands for SGLang's pool of slots, that duplicates go back to."""

    device = "cpu"

    def free_segment(self, slots: Any, *, start_pos: int) -> None:
        """Nothing to do."""


class SGLang(Core):
    """A radix cache of SGLang: its `match_prefix` names a node, and `path_device_indices` reads the slots."""

    def __init__(self, name: str, page_size: int) -> None:
        import torch
        from sglang.srt.mem_cache import base_prefix_cache as base
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixCache as SGLangRadixCache
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self._base, self._key, self._tensor = base, RadixKey, torch.from_numpy
        core = name.partition(" ")[2]
        params: dict[str, Any] = {
            "disable": False, "req_to_token_pool": None, "token_to_kv_pool_allocator": _NoPool(), "page_size": page_size
        }  # fmt: skip
        if core == "radix_cache":
            cache: Any = SGLangRadixCache(CacheInitParams(**params))
        else:
            cache = UnifiedRadixCache(
                CacheInitParams(**params, tree_components=(ComponentType.FULL,), tree_core_backend=core)
            )
            if cache._tree_core_backend != core:
                raise KVRetractError(f"SGLang has no tree core {core!r} here, it took {cache._tree_core_backend!r}")
        self._cache, self.lookup, self.insert = cache, cache.match_prefix, cache.insert

    def asked(self, ids: IntArray) -> Any:
        """Return the parameters of `match_prefix`."""
        return self._base.MatchPrefixParams(key=self._radix_key(ids))

    def given(self, ids: IntArray, slots: IntArray, matched: int) -> tuple[Any, ...]:
        """Return the parameters of `insert`: as from a server, the matched slots are the tree's own."""
        key, value = self._radix_key(ids), self._tensor(slots)
        return (self._base.InsertParams(key=key, value=value, prev_prefix_len=matched),)

    def gather(self, found: Any) -> Any:
        """Read them off the path."""
        return self._cache.path_device_indices(found.last_device_node)

    def _radix_key(self, ids: IntArray) -> Any:
        tokens = array("q")
        tokens.frombytes(ids.tobytes())
        return self._key(tokens)


@dataclass(frozen=True, slots=True)
class Run:
    """The calls of one run over the workload, in order."""

    times: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    """Nanoseconds: `match` until the slots are there, of that `lookup` until their number is known, `insert`."""
    results: list[tuple[int, int, int]] = field(default_factory=list)
    """Entries matched, the sum of their slots, and entries that `insert` found."""


def run_core(core: Core, workload: Workload) -> Run:
    """Take every step: match, then insert with the matched slots and new ones.

    Keys and slots in the core's own form are made outside of what is timed.
    """
    run, clock = Run(), time.perf_counter_ns
    match, lookup, insert = (run.times[name] for name in _COLUMNS)
    next_slot = 0
    for step in workload.steps:
        ids = workload.ids[step.thread]
        asked = core.asked(ids[: step.asked])
        started = clock()
        found = core.lookup(asked)
        looked_up = clock()
        slots = core.gather(found)
        matched = clock()
        lookup.append(looked_up - started)
        match.append(matched - started)
        slots = np.asarray(slots)
        fresh = np.arange(next_slot, next_slot + step.end - len(slots))
        next_slot += len(fresh)
        given = core.given(ids[: step.end], np.concatenate([slots, fresh]), len(slots))
        started = clock()
        inserted = core.insert(*given)
        insert.append(clock() - started)
        run.results.append((len(slots), int(slots.sum()), core.known(inserted)))
    if not core.gathers:
        lookup.clear()
    return run


def run_floor(workload: Workload, results: Sequence[tuple[int, int, int]]) -> Run:
    """Time what no index can leave out: comparing what is known (memcmp) and copying what is asked for and new."""
    run, clock = Run(), time.perf_counter_ns
    room = np.empty((2, max(step.end for step in workload.steps)), dtype=np.int64)
    for step, (matched, _, known) in zip(workload.steps, results, strict=True):
        ids, (kept, copied) = workload.ids[step.thread], room
        here, there = ids[:matched].tobytes(), ids[:matched].tobytes()
        slots, to = ids[:matched].copy(), kept[:matched]
        started = clock()
        same = here == there
        np.copyto(to, slots)
        run.times["match"].append(clock() - started)
        new, new_ids, new_slots = ids[known : step.end].copy(), kept[known : step.end], copied[known : step.end]
        here, there = ids[:known].tobytes(), ids[:known].tobytes()
        started = clock()
        same &= here == there
        np.copyto(new_ids, new)
        np.copyto(new_slots, new)
        run.times["insert"].append(clock() - started)
        assert same, "a key is equal to its copy"
    return run


def measure(
    workload: Workload,
    cores: Mapping[str, Callable[[int], Core]],
    *,
    page_size: int,
    repeats: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run all cores over the workload, and the floor; return their times by repetition and what they found.

    The order turns with every repetition; the first one warms up and is not counted. Garbage is collected between
    runs, not inside of them.

    Args:
        workload: threads and steps.
        cores: by name; each is called with the page size and returns an empty index.
        page_size: of all of them.
        repeats: repetitions that count.
        progress: called with runs done and runs in all.

    Returns:
        `times`: by core and column, a list with one entry per repetition: seconds of all calls (`match_s`) and the
        median call in microseconds (`match_us`). `workload`: facts of it.

    Raises:
        CoresDisagreeError: a call found something else than that of another core.
    """
    names = list(cores)
    results: list[tuple[int, int, int]] = []
    times: dict[str, dict[str, list[float]]] = {name: {} for name in (*names, FLOOR)}
    for repeat in range(repeats + 1):
        turn = repeat % len(names)
        runs = {}
        for place, name in enumerate(names[turn:] + names[:turn], repeat * len(names) + 1):
            runs[name] = _undisturbed(partial(run_core, cores[name](page_size), workload))
            results = results or runs[name].results
            _check_same(results, runs[name].results, name)
            progress(place, (repeats + 1) * len(names))
        runs[FLOOR] = _undisturbed(partial(run_floor, workload, results))
        for name, run in runs.items() if repeat else ():
            _note(times[name], run)
    return {"times": times, "workload": _facts(workload, results, page_size)}


def _note(times: dict[str, list[float]], run: Run) -> None:
    for column, calls in run.times.items():
        if calls:
            times.setdefault(f"{column}_s", []).append(sum(calls) / 1e9)
            times.setdefault(f"{column}_us", []).append(float(np.median(calls)) / 1e3)


def _facts(workload: Workload, results: Sequence[tuple[int, int, int]], page_size: int) -> dict[str, Any]:
    matched = sum(found for found, _, _ in results)
    steps = zip(workload.steps, results, strict=True)
    held = sum(max(step.end // page_size * page_size - known, 0) for step, (_, _, known) in steps)
    asked, total = sum(step.asked for step in workload.steps), sum(map(len, workload.ids))
    return {
        "threads": len(workload.ids),
        "calls": 2 * len(workload.steps),
        "tokens_asked": asked,
        "tokens_inserted": sum(step.end for step in workload.steps),
        "hit_rate": matched / asked,
        "tokens_of_threads": total,
        "tokens_held": held,
        "shared_fraction": 1 - held / total,
    }


def _undisturbed(run: Callable[[], Run]) -> Run:
    gc.collect()
    gc.disable()
    try:
        return run()
    finally:
        gc.enable()


def _check_same(expected: list[tuple[int, int, int]], got: list[tuple[int, int, int]], name: str) -> None:
    for call, (wanted, found) in enumerate(zip(expected, got, strict=True)):
        if wanted != found:
            raise CoresDisagreeError(
                f"step {call}: {name!r} matched, summed up and knew {found}, the first core {wanted}"
            )


def main() -> None:
    """Take settings as JSON; print progress and the result of `measure`, with versions."""
    settings = json.loads(sys.argv[1])

    def tell(done: int, total: int | None) -> None:
        print(MARK + json.dumps({"done": done, "total": total}), flush=True)

    found = measure(
        make_workload(settings["threads"], settings["seed"]),
        {OURS: Ours, **{name: partial(SGLang, name) for name in SGLANG}},
        page_size=settings["page"], repeats=settings["repeats"], progress=tell,
    )  # fmt: skip
    found["versions"] = {**versions(), "sglang": version("sglang")}
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KVRetractError as error:
        sys.exit(str(error))
