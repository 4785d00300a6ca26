"""Threads beyond the window: a bi-layer cache (ACRE, arXiv 2412.12486) over an embedded engine.

The oldest windows of a long thread are encoded once, each with its landmarks, and kept apart: landmarks (L1) on the
device, tokens (L2) on the host. What is newer, the *local* part, is cached in the ordinary way and reads the first
tokens of the thread, the end of the last window, and the landmarks where they are for that. Before an answer the newest
tokens look for landmarks (`cache.refill.Pooling`); the tokens behind the best are brought back, layer by layer, and the
newest tokens run again with them in sight.

What is cached depends on the thread alone, never on what was asked: an answer is read again as part of the next step.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..cache.base import NO_SLOT, IntArray, ThreadKey
from ..cache.bilayer import BiLayerPool, WindowShape
from ..cache.lease import Lease
from ..cache.manager import CacheManager
from ..cache.refill import Layout, Pooling
from ..cache.window_file import WindowFile
from ..landmarks import Landmarks, find_landmarks
from ..types import Divergence, EraseResult, Interval, SamplingParams
from .base import (
    Engine,
    ExtendResult,
    GeneratedToken,
    LogitsProcessor,
    SupportsErase,
    check_edit,
    check_warm,
    divergence_of,
)
from .decoding import decode
from .hf import HFEngine
from .refilling import Answering
from .sampling import Sampler
from .window_store import Parts, WindowStore
from .windows import States


@dataclass(frozen=True, slots=True, kw_only=True)
class BiLayer:
    """How a long thread is kept."""

    window: int = 1024
    """Tokens that are encoded together."""
    overlap: int = 64
    """Tokens of the window before that a window reads in full, besides its landmarks."""
    ratio: int = 16
    """Tokens that one landmark stands for; divides the window."""
    local: int = 2048
    """Most tokens outside of windows: a thread that has more gives its oldest ones away, a window at a time."""
    max_tokens: int = 65_536
    """Most tokens in all windows of all threads: the budget of L2."""
    max_landmarks: int | None = None
    """Most landmarks of all threads: the budget of L1. None: what `max_tokens` leads to."""
    refill: int = 512
    """Most tokens that are brought back before an answer, in each layer."""
    sinks: int = 4
    """First tokens of a thread that everything attends to."""
    landmark_positions: int = 512
    """Rotary positions that the landmarks of a thread share."""
    queries: int = 64
    """The newest tokens of a thread, which choose what is brought back."""
    rounds: int = 1
    """How often they choose, each time seeing what the last one brought back."""
    refresh: int = 0
    """Choose again after so many decoded tokens. 0: once for an answer."""
    landmarks: str = ""
    """What stands for blocks: `pooled`, a folder of trained landmarks, or nothing: as `find_landmarks` says."""
    pooling: Pooling | None = None
    """How what is looked for in a landmark becomes a score. None: as the landmarks were made for."""
    folder: str | Path | None = None
    """Where L2 lies on disk, mapped into memory: it is there again after a restart. None: in memory."""

    def __post_init__(self) -> None:
        """Check sizes."""
        for name, least in (
            ("window", 1), ("ratio", 1), ("overlap", 0), ("refill", 0), ("sinks", 0), ("landmark_positions", 1),
            ("queries", 1), ("rounds", 1), ("refresh", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if self.local < self.window + self.queries:
            raise ValueError(
                f"expected room for a window and the queries outside of windows, got local={self.local} for "
                f"window={self.window} and queries={self.queries}"
            )
        WindowShape(window=self.window, ratio=self.ratio)

    @property
    def layout(self) -> Layout:
        """Which positions are for what."""
        return Layout(sinks=self.sinks, landmarks=self.landmark_positions, refilled=self.refill)

    @property
    def num_windows(self) -> int:
        """That both budgets allow."""
        of_tokens = self.max_tokens // self.window
        of_landmarks = of_tokens if self.max_landmarks is None else self.max_landmarks * self.ratio // self.window
        return min(of_tokens, of_landmarks)

    def moved(self, num_entries: int) -> int:
        """Return how many windows of a thread are kept apart."""
        return max(0, -(-(num_entries - self.local) // self.window))


class BiLayerEngine(Engine):
    """Holds short threads as the engine below does, and long ones in two layers.

    A thread of at most `local` tokens is that engine's alone. A span that is retracted from an old window leaves both
    layers there: its tokens are hidden and the window, landmarks included, is encoded without it. Later windows keep
    what they took from it until the thread is healed. Whatever the eraser, a span in the local part is left out and
    what follows it there is read again.

    Args:
        engine: runs the model; its pages may be of any size.
        settings: how long threads are kept.
        landmarks: what stands for blocks of tokens; by default what the settings name.

    Raises:
        ValueError: the layout needs more positions than the model has.
        LandmarkMismatchError: the landmarks are missing, or belong to another model.
        WindowFileError: the folder is in use, or holds windows of another model or of other settings.
    """

    store: ClassVar[type[WindowStore]] = WindowStore
    """What keeps the windows."""

    def __init__(
        self, engine: HFEngine, settings: BiLayer | None = None, *, landmarks: Landmarks | None = None
    ) -> None:
        self.inner, self.settings = engine, settings or BiLayer()
        s, spec, self.model = self.settings, engine.spec, engine.model
        needed = s.layout.local + s.overlap + s.local
        if needed >= spec.max_positions:
            raise ValueError(
                f"the layout needs {needed} positions and model {spec.name!r} has {spec.max_positions}; pass smaller "
                "local, refill or landmark_positions"
            )
        self.landmarks = landmarks or find_landmarks(s.landmarks, engine.model, engine.runner.fingerprint)
        sizes: dict[str, Any] = {
            "num_layers": spec.num_layers, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim,
            "num_windows": s.num_windows, "shape": WindowShape(window=s.window, ratio=s.ratio),
            "dtype": engine.model.dtype,
        }  # fmt: skip
        identity = f"{engine.runner.fingerprint} {self.landmarks.identity} {s.layout} overlap {s.overlap}"
        file = None if s.folder is None else WindowFile(Path(s.folder), identity=identity, **sizes)
        pool = BiLayerPool(device=spec.device, storage=None if file is None else file.storage, **sizes)
        self.windows = self.store(engine.model, engine.rotary, pool, self.landmarks, s.layout, overlap=s.overlap)
        self._save = None
        if file is not None:
            try:
                file.restore(self.windows.manager)
            except BaseException:
                file.close()
                raise
            self._save = weakref.finalize(self, _save, file, self.windows.manager, engine.lock)
        self.spec = replace(spec, max_positions=s.num_windows * s.window + s.local)

    def cached(self, key: ThreadKey) -> int:
        """Return how many leading entries are cached, in either way."""
        with self.inner.lock:
            moved = self.settings.moved(len(key))
            if not moved:
                return self.inner.cached(key)
            end = moved * self.settings.window
            found = self.windows.manager.match(key.ids[:end], extra_key=key.extra_key)
            if found < end:
                return found
            path = self._local_path(key, self.windows.chain(key.ids, moved))
            return end + max(0, self.inner.cached(path) - moved * self._names)

    def extend(self, key: ThreadKey, *, num_last: int = 1) -> ExtendResult:
        """As `LocalEngine.extend`; the last entries must lie in the local part.

        Raises:
            ValueError: they do not; also as there.
            ColdTombstoneError: a tombstone would have to be prefilled.
            PoolExhaustedError: the thread does not fit.
        """
        with self.inner.lock:
            if not self.settings.moved(len(key)):
                return self.inner.extend(key, num_last=num_last)
            _, result, lease = self._answering(key, num_last)
            self.windows.manager.release(lease)
            return result

    def generate(
        self, key: ThreadKey, sampling: SamplingParams, *, logits_processor: LogitsProcessor | None = None
    ) -> Iterator[GeneratedToken]:
        """Bring back what the newest tokens ask for, and decode."""
        if not self.settings.moved(len(key)):
            yield from self.inner.generate(key, sampling, logits_processor=logits_processor)
            return
        sampler = Sampler(sampling, self.spec.device)
        with self.inner.lock:
            answering, result, lease = self._answering(key, 1)

        def forward(token: int) -> torch.Tensor:
            with self.inner.lock:
                return answering.read(token)

        try:
            yield from decode(
                result.logits[-1], forward, sampler, sampling, num_cached_tokens=result.num_cached_tokens,
                room=self.inner.spec.max_positions - answering.next_position, logits_processor=logits_processor,
            )  # fmt: skip
        finally:
            with self.inner.lock:
                self.windows.manager.release(lease)

    def erase(
        self, key: ThreadKey, spans: Sequence[Interval], eraser: SupportsErase, new_key: ThreadKey
    ) -> EraseResult:
        """Withdraw spans from both layers; see the class."""
        moved = self.settings.moved(len(key))
        if not moved:
            return self.inner.erase(key, spans, eraser, new_key)
        check_edit(key, spans, eraser, new_key)
        started = time.perf_counter()
        with self.inner.lock:
            first, end = spans[0][0], moved * self.settings.window
            was_cached = self.windows.manager.match(key.ids[:end], extra_key=key.extra_key)
            freed = self._drop_local(key, moved, max(0, first - end))
            if eraser.exact or first >= was_cached:
                freed += self.windows.manager.drop(key.ids[:end], first, extra_key=key.extra_key)
                recomputed = self._encode_anew(new_key) if first < was_cached else 0
                counts, exact = {"tokens_recomputed": recomputed, "slots_freed": 0}, True
                erased = sum(b - a for a, b in spans if b <= was_cached)
            else:
                erased, counts = self.windows.erase(key.cut(end), spans, new_key.cut(end))
                exact = not erased
        counts["slots_freed"] += freed
        return EraseResult(
            eraser_id=eraser.eraser_id, tokens_erased=erased, exact=exact,
            edit_ms=(time.perf_counter() - started) * 1e3, **counts,
        )  # fmt: skip

    def drop(self, key: ThreadKey, start: int) -> int:
        """Forget the exclusive tail, in both layers and in the local part."""
        return self._forget(key, start, branches=False)

    def purge(self, key: ThreadKey, start: int) -> int:
        """Forget the tail and its branches, in both layers and in every local part behind them."""
        return self._forget(key, start, branches=True)

    def divergence(self, exact: ThreadKey, steered: ThreadKey, num_last: int) -> Divergence | None:
        """See the base class; each thread brings back what it looks at."""
        return divergence_of(self.extend, exact, steered, num_last)

    def prefill(self, key: ThreadKey) -> int:
        """See the base class."""
        return self.extend(key).num_prefilled_tokens if self.cached(key) < len(key) else 0

    def check_integrity(self) -> None:
        """Check the conservation laws of both caches."""
        with self.inner.lock:
            self.inner.check_integrity()
            self.windows.manager.check_integrity()

    def tokens_in_use(self) -> int:
        """Slots in use, those of windows included."""
        with self.inner.lock:
            return self.inner.tokens_in_use() + self.windows.manager.tokens_in_use()

    def close(self) -> None:
        """Save what lies in the folder, and release it; the engine is not used any more. Closing twice is harmless.

        Also done when the engine is forgotten or the process ends. After a crash the folder begins empty.
        """
        if self._save is not None:
            self._save()

    @property
    def _names(self) -> int:
        """Entries by which a window is named in the local part's index: a page of it."""
        return self.inner.manager.pool.page_size

    def _local_path(self, key: ThreadKey, chain: IntArray) -> ThreadKey:
        """Return what the local part is indexed by: names of the windows before it, without KV, then its tokens."""
        ids = np.concatenate([np.repeat(chain, self._names), key.ids[len(chain) * self.settings.window :]])
        return ThreadKey(ids, np.arange(len(ids)), f"{key.extra_key}\0bilayer")

    def _answering(self, key: ThreadKey, num_last: int) -> tuple[Answering, ExtendResult, Lease]:
        """Cache what of a thread is not, and read its newest tokens with what they bring back in sight.

        Returns:
            What goes on from there, the first logits, and the lock on the windows, for the caller to release.
        """
        s, moved = self.settings, self.settings.moved(len(key))
        start = moved * s.window
        local = key.ids[start:]
        check_warm(local, start)  # the local part keeps no tombstones
        if not 1 <= num_last <= len(local):
            raise ValueError(f"num_last must be in [1, {len(local)}], the local part of the thread, got {num_last}")
        lease = self.windows.lease(key, moved)
        try:
            encoded = start - lease.num_cached
            parts = self.windows.parts(lease.slots)
            answering, cached = self._read_local(key, moved, parts, num_last)
            logits = answering.refill()
        except BaseException:
            self.windows.manager.release(lease)
            raise
        result = ExtendResult(
            logits=logits, num_cached_tokens=lease.num_cached + cached,
            num_prefilled_tokens=encoded + len(local) - cached,
        )  # fmt: skip
        return answering, result, lease

    def _read_local(self, key: ThreadKey, moved: int, parts: Parts, num_last: int) -> tuple[Answering, int]:
        """Cache what of the local part is not; return what goes on there, and how many of its tokens were cached."""
        s, manager = self.settings, self.inner.manager
        path = self._local_path(key, self.windows.chain(key.ids, moved))
        names = moved * self._names
        manager.index.insert(path.ids[:names], np.full(names, NO_SLOT), extra_key=path.extra_key)
        lease = manager.lease(path.ids, extra_key=path.extra_key)
        keep = lease.num_cached
        try:
            ids = path.ids[names:]
            queries = min(len(ids), max(num_last, s.queries))
            cached = lease.num_cached - names
            known = min(cached, len(ids) - queries)
            new = manager.append(lease, ids[cached:]) if cached < len(ids) else np.empty(0, np.int64)
            answering = Answering(
                self.windows, self.inner.runner, parts, ids, States(*manager.pool.read(lease.slots[names:][:known])),
                num_queries=queries, num_last=num_last, budget=s.refill, rounds=s.rounds, refresh=s.refresh,
                pooling=s.pooling or self.landmarks.pooling, chunk_size=self.inner.chunk_size,
            )  # fmt: skip
            states = answering.begin()
            manager.pool.write(new, states.k[:, cached:], states.v[:, cached:])
            keep = len(lease)
        finally:
            manager.release(lease, keep=keep)
        return answering, known

    def _encode_anew(self, key: ThreadKey) -> int:
        """Encode the windows of a thread that are not cached; return the tokens it took."""
        lease = self.windows.lease(key, self.settings.moved(len(key)))
        self.windows.manager.release(lease)
        return len(lease) - lease.num_cached

    def _drop_local(self, key: ThreadKey, moved: int, start: int) -> int:
        path = self._local_path(key, self.windows.chain(key.ids, moved))
        return self.inner.drop(path, moved * self._names + start)

    def _forget(self, key: ThreadKey, start: int, *, branches: bool) -> int:
        window, inner, manager = self.settings.window, self.inner, self.windows.manager
        of_windows, of_local = (manager.purge, inner.purge) if branches else (manager.drop, inner.drop)
        with inner.lock:
            whole = len(key) // window
            freed = of_windows(key.ids[: whole * window], start, extra_key=key.extra_key) + of_local(key, start)
            # A thread that was shorter kept fewer windows apart, and so its local part began earlier.
            chain = self.windows.chain(key.ids, whole)
            for moved in range(1, whole + 1):
                at = min(moved, start // window) * self._names + max(0, start - moved * window)
                freed += of_local(self._local_path(key, chain[:moved]), at)
        return freed


def _save(file: WindowFile, manager: CacheManager, lock: threading.RLock) -> None:
    with lock:
        file.save(manager)
        file.close()
