"""Time one edit of a long thread under every eraser, interleaved, on random token ids and random or real weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from kv_retract.cache.base import IntArray, ThreadKey
from kv_retract.cache.keys import KeyEdit, build_key
from kv_retract.cache.radix import RadixCache
from kv_retract.erasers import ERASERS, Eraser
from kv_retract.errors import KVRetractError

from .arms import REFERENCE, clock
from .floor import Limits, edit_work, measure_limits
from .machine import describe_machine, versions
from .progress import Progress, silent
from .specs import Spec, arm_label
from .stats import median, spread

if TYPE_CHECKING:
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import LoadedModel

NEXT_TOKENS = 16
"""Length of the message that the next step prefills."""
MATCH_TOKENS = 32_768
_MATCH_NODES = 64


class BenchSettingError(KVRetractError, ValueError):
    """The edit to time does not fit together, or not into the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditBench:
    """What to time."""

    context: int = 8192
    """Tokens of the thread."""
    span: int = 64
    """Tokens of the erased span."""
    depth: float = 0.1
    """Where the span begins, as a share of the thread."""
    arms: tuple[Spec, ...] = tuple(Spec(name) for name in (
        "none", "mask", "shift", "repair", "selective", "erratum", "recompute",
    ))  # fmt: skip
    """Erasers; `recompute`, that the others are compared with, runs in any case."""
    model: str = "random-256"
    repeats: int = 7
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


def bench_edit(
    settings: EditBench,
    *,
    loaded: LoadedModel | None = None,
    limits: Limits | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time edits and return one JSON-able document.

    The thread is prefilled once and put back, as it was, before each edit. Timed are `Engine.erase` (which for
    `recompute` includes the prefill of the suffix), then the next step: the prefill of `NEXT_TOKENS` new tokens up to
    the logits of the next one. The order of the arms turns with every repetition; the first one warms up and is not
    counted. Beside each edit stands the least that it can take (`floor_ms`).

    Args:
        settings: what to time.
        loaded: the model, where it is loaded already.
        limits: of the device, where they are measured already.
        progress: called with edits done and edits in all.

    Raises:
        BenchSettingError: the span does not fit into the thread, or the thread into the model.
        UnknownNameError: the model or an eraser has no such name.
    """
    from kv_retract.engine.hf import HFEngine
    from kv_retract.engine.models import load_model

    start = _start_of(settings)
    specs = [spec for spec in settings.arms if spec.label != REFERENCE] + [Spec(REFERENCE)]
    made = [(spec, spec.create(ERASERS)) for spec in specs]
    erasers = {arm_label(spec, eraser): eraser for spec, eraser in made}
    loaded = loaded or load_model(settings.model, device=settings.device, dtype=settings.dtype, seed=settings.seed)
    # Room for the copies that an edit of a shared thread would make.
    engine = HFEngine(loaded.model, max_tokens=3 * (settings.context + NEXT_TOKENS), name=loaded.name)
    check_positions(loaded, settings.context)
    ids = np.random.default_rng(settings.seed).integers(0, engine.spec.vocab_size, settings.context + NEXT_TOKENS)
    timings = _time_arms(engine, ids, (start, start + settings.span), erasers, settings.repeats, progress)
    limits = limits or measure_limits(settings.device, loaded.model.dtype)
    arms = {}
    for label, times in timings.items():
        work = edit_work(erasers[label], loaded.model, context=settings.context, span=settings.span, start=start)
        arms[label] = _summary(*times, work.floor_ms(limits))
    reference = arms[REFERENCE]["edit_ms_median"]
    return {
        "context": settings.context,
        "span": settings.span,
        "depth": settings.depth,
        "model": loaded.name,
        "arms": arms,
        "ratio_to_recompute": {label: arm["edit_ms_median"] / reference for label, arm in arms.items()},
        "fork_page_fraction": fork_page_fraction(engine, ids),
        "match_prefix_ms_32k": match_prefix_ms(MATCH_TOKENS),
        "limits": asdict(limits),
        "repeats": settings.repeats,
        "next_tokens": NEXT_TOKENS,
        "num_parameters": loaded.model.num_parameters(),
        "dtype": settings.dtype,
        "seed": settings.seed,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device),
        "versions": versions(),
    }


def _start_of(settings: EditBench) -> int:
    """Return where the span begins; raises BenchSettingError where it does not fit."""
    if not 0 <= settings.depth <= 1:
        raise BenchSettingError(f"expected a depth from 0 to 1, got {settings.depth}; pass another --depth")
    start = int(settings.depth * settings.context)
    if not (settings.span > 0 and start + settings.span <= settings.context and settings.repeats > 0):
        raise BenchSettingError(
            f"expected a span inside of the thread and at least one repetition, got {settings.span} tokens from token "
            f"{start} on of {settings.context}, {settings.repeats} repetitions; pass a smaller --span or --depth"
        )
    return start


def check_positions(loaded: LoadedModel, context: int) -> None:
    """Raise BenchSettingError where a thread of so many tokens, and a next step, do not fit into a model."""
    most: int = loaded.model.config.max_position_embeddings
    if context + NEXT_TOKENS > most:
        raise BenchSettingError(
            f"model {loaded.name!r} has {most} positions, the thread needs {context + NEXT_TOKENS}; "
            "pass a smaller --context or --prefix"
        )


def fork_page_fraction(engine: HFEngine, ids: IntArray) -> float:
    """Return the pages that a fork takes which goes on with `NEXT_TOKENS` tokens of its own, per page of the thread."""
    thread, pool = build_key(ids[:-NEXT_TOKENS], (), extra_key="fork"), engine.manager.pool
    engine.extend(thread)
    before = engine.manager.pages_in_use()
    engine.extend(build_key(ids, (), extra_key="fork"))
    fraction = (engine.manager.pages_in_use() - before) / (len(thread) // pool.page_size)
    engine.drop(build_key(ids, (), extra_key="fork"), 0)
    return fraction


def match_prefix_ms(num_tokens: int, *, repeats: int = 50) -> float:
    """Return the median time of `RadixCache.match_prefix` on a path of `num_tokens` that grew in `_MATCH_NODES` turns.

    At the end of every turn another thread branches off.
    """
    index, ids = RadixCache(), np.arange(num_tokens, dtype=np.int64)
    for end in np.linspace(0, num_tokens, _MATCH_NODES + 1, dtype=np.int64)[1:]:
        index.insert(ids[:end], ids[:end])
        index.insert(np.append(ids[:end], -end), np.append(ids[:end], num_tokens + end))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        matched = index.match_prefix(ids).slots
        times.append((time.perf_counter() - started) * 1e3)
        assert len(matched) == num_tokens, "the whole path is indexed"
    return float(np.median(times))


def _time_arms(
    engine: HFEngine,
    ids: IntArray,
    span: tuple[int, int],
    erasers: dict[str, Eraser],
    repeats: int,
    progress: Progress,
) -> dict[str, tuple[list[float], list[float]]]:
    timings: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in erasers}
    order, done = list(erasers), 0
    thread = _Thread(engine, ids[:-NEXT_TOKENS])
    for repeat in range(repeats + 1):
        turn = repeat % len(order)
        for label in order[turn:] + order[:turn]:
            times = _time_edit(thread, ids, span, erasers[label])
            if repeat:
                for kept, milliseconds in zip(timings[label], times, strict=True):
                    kept.append(milliseconds)
            done += 1
            progress(done, (repeats + 1) * len(order))
    return timings


class _Thread:
    """A thread that is prefilled once and can be put into an empty cache again."""

    def __init__(self, engine: HFEngine, ids: IntArray) -> None:
        self.engine, self.key = engine, build_key(ids, ())
        engine.extend(self.key)
        self._states = engine.read_kv(self.key, 0, len(ids))
        engine.drop(self.key, 0)

    def put_back(self) -> None:
        """Cache it as a prefill would."""
        manager = self.engine.manager
        with self.engine.lock:
            lease = manager.lease(self.key.ids)
            manager.pool.write(manager.append(lease, self.key.ids), *self._states)
            manager.release(lease)


def _time_edit(thread: _Thread, ids: IntArray, span: tuple[int, int], eraser: Eraser) -> tuple[float, float]:
    """Return the milliseconds of one edit and of the step after it, on a thread that nobody shares."""
    engine, old = thread.engine, thread.key
    device = engine.spec.device
    edit = KeyEdit(
        start=span[0], end=span[1], exact=eraser.exact, eraser_id=eraser.eraser_id, retraction_id="bench",
        closes_gap=eraser.closes_gap,
    )  # fmt: skip
    new, grown = (build_key(known, [edit]) for known in (ids[:-NEXT_TOKENS], ids))
    thread.put_back()
    started = clock(device)
    engine.erase(old, [span], eraser, new)
    edited = clock(device)
    engine.extend(grown)
    stepped = clock(device)
    _forget(engine, grown)
    return (edited - started) * 1e3, (stepped - edited) * 1e3


def _forget(engine: HFEngine, key: ThreadKey) -> None:
    engine.drop(key, 0)
    assert engine.tokens_in_use() == 0, "every edit is timed on an empty cache"


def _summary(edit_ms: Sequence[float], next_step_ms: Sequence[float], floor_ms: float) -> dict[str, Any]:
    edit = spread(edit_ms)
    assert edit is not None, "there is at least one repetition"
    return {
        "edit_ms_median": edit.median,
        "next_step_ms_median": median(next_step_ms),
        "edit_ms": asdict(edit),
        "floor_ms": floor_ms,
        "of_floor": edit.median / floor_ms if floor_ms else None,
    }
