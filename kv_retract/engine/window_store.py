"""The windows of long threads: encoded once, shared by forks, edited without their later windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from ..cache.base import NO_SLOT, IntArray, ThreadKey
from ..cache.bilayer import BiLayerPool
from ..cache.lease import Lease
from ..cache.manager import CacheManager
from ..cache.radix import RadixCache
from ..cache.refill import Layout, choose
from ..kernels.rope import Rotary
from ..landmarks import Landmarks
from ..types import Interval
from .base import check_warm, end_of_edit
from .windows import States, encode_window, joined


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What the windows of a thread offer whoever comes after them; keys are rotated for the layout."""

    landmarks: States
    """What is chosen among; keys without rotation."""
    attended: States
    """What of them is read: nothing, where they only say what to bring back."""
    sinks: States
    """The first tokens of the thread."""
    overlap: States
    """The last tokens of the last window."""
    candidates: IntArray
    """Slots of L2 of what can be brought back: all tokens but the two above. Shape: (num_tokens,)"""
    sizes: IntArray
    """How many of them each landmark stands for. Shape: (num_landmarks,)"""

    @property
    def context(self) -> States:
        """What is read before local tokens, when nothing is brought back."""
        return joined([self.attended, self.sinks, self.overlap])


class WindowStore:
    """Encodes, keeps and edits windows. Not thread-safe by itself: the engine calls it under its lock.

    Args:
        model: frozen.
        rotary: of the model.
        pool: both layers.
        landmarks: what stands for blocks.
        layout: which positions are for what.
        overlap: tokens of the window before that a window reads in full.
        eviction: `lru` or `lfu`.
    """

    def __init__(
        self,
        model: object,
        rotary: Rotary,
        pool: BiLayerPool,
        landmarks: Landmarks,
        layout: Layout,
        *,
        overlap: int,
        eviction: str = "lru",
    ) -> None:
        self.pool, self.layout, self.landmarks = pool, layout, landmarks
        self.window = pool.shape.window
        self.manager = CacheManager(pool, RadixCache(page_size=self.window, eviction=eviction))
        self.start = layout.local + overlap
        """Position of the first token of a window, and of what comes after the last one."""
        self.rotary, self._model, self._overlap = rotary, model, overlap

    def lease(self, key: ThreadKey, num_windows: int) -> Lease:
        """Return the first windows of a thread, locked until the manager's `release`; encode those that are missing.

        Raises:
            ColdTombstoneError: one that is missing holds a tombstone.
            PoolExhaustedError: no room even after eviction; what was encoded stays.
        """
        size = self.window
        lease = self.manager.lease(key.ids[: num_windows * size], extra_key=key.extra_key)
        done = len(lease)
        try:
            for start in range(done, num_windows * size, size):
                ids = key.ids[start : start + size]
                check_warm(ids, start)
                self.manager.append(lease, ids)
                self._encode(lease.slots[:start], lease.slots[start:], ids)
                done = start + size
        except BaseException:
            self.manager.release(lease, keep=done)
            raise
        self.manager.publish(lease)
        return lease

    def parts(self, slots: IntArray, *, choosing: bool = True) -> Parts:
        """Return what some windows offer; copies.

        Args:
            slots: of whole windows, from the first of the thread on. Shape: (num_windows * window,)
            choosing: whether something of it may be brought back; else there are no candidates, and landmarks only
                where they are attended to.
        """
        where = np.flatnonzero(slots != NO_SLOT)
        first = where[: self.layout.sinks]
        last = where[max(len(first), len(where) - self._overlap) :]
        between = where[len(first) : len(where) - len(last)]
        of = slots if choosing or self.landmarks.attended else slots[:0]
        rows = self.pool.landmark_rows(of)
        between = between if choosing else between[:0]
        number = np.cumsum(self.pool.shape.blocks(of)) - 1  # of the landmark of each block
        landmarks = States(*self.pool.read_landmarks(rows))
        read = landmarks.part(slice(None if self.landmarks.attended else 0))
        return Parts(
            landmarks=landmarks,
            attended=read.placed(self.layout.of_landmarks(len(read)), self.rotary),
            sinks=self._tokens(slots[first], np.arange(len(first))),
            overlap=self._tokens(slots[last], self.start - len(last) + np.arange(len(last))),
            candidates=slots[between],
            sizes=np.bincount(number[between // self.pool.shape.ratio], minlength=len(rows)),
        )

    def refilled(self, parts: Parts, scores: torch.Tensor, budget: int) -> States:
        """Bring the L2 entries back that the best landmarks stand for; those of each layer by its own scores.

        Args:
            parts: of the thread.
            scores: Shape: (num_layers, num_landmarks)
            budget: most tokens.

        Returns:
            In the order of the thread, keys rotated for the layout.
        """
        chosen = choose(scores, parts.sizes, budget)
        states = [self.pool.read_layer(layer, parts.candidates[index]) for layer, index in enumerate(chosen)]
        k, v = (torch.stack(part).to(self.pool.landmark_k.device) for part in zip(*states, strict=True))
        return States(k, v).placed(self.layout.of_refilled(chosen.shape[1]), self.rotary)

    def erase(self, key: ThreadKey, spans: Sequence[Interval], new_key: ThreadKey) -> tuple[int, dict[str, int]]:
        """Withdraw spans from the cached windows they are in: from L2, and from the landmarks, which are encoded anew.

        Windows behind them keep what they took from the old landmarks.

        Args:
            key: the thread.
            spans: in order; those past the cached windows are ignored.
            new_key: as long, with tombstones.

        Returns:
            Tokens erased, and counts as in `EraseResult`.
        """
        cached = end_of_edit(self.manager.match(key.ids, extra_key=key.extra_key), spans, self.window)
        inside = [(start, end) for start, end in spans if end <= cached]
        if not inside:
            return 0, {"slots_freed": self.manager.drop(key.ids, cached, extra_key=key.extra_key)}
        if cached < self.manager.match(key.ids, extra_key=key.extra_key):
            self.manager.drop(key.ids, cached, extra_key=key.extra_key)
        touched = sorted(
            {w for start, end in inside for w in range(start // self.window, (end - 1) // self.window + 1)}
        )
        made_before = self.manager.match(new_key.ids, extra_key=key.extra_key) > touched[-1] * self.window
        recomputed = 0
        with self.manager.open_edit(key.ids[:cached], extra_key=key.extra_key, start=inside[0][0]) as path:
            for start, end in inside:
                path.hide(start, end)
            for number in () if made_before else touched:
                entries = number * self.window + np.arange(self.window)
                visible = entries[path.slots[entries] != NO_SLOT]
                if len(visible):
                    path.own(visible)
                    self._encode(path.slots[: entries[0]], path.slots[entries], key.ids[visible])
                recomputed += len(visible)
            freed = path.commit(new_key.ids[:cached])
        erased = sum(end - start for start, end in inside)
        return erased, {"tokens_recomputed": recomputed, "slots_copied": path.slots_copied, "slots_freed": freed}

    def chain(self, ids: IntArray, num_windows: int) -> IntArray:
        """Return one negative id for each of the first windows of a thread, that names it and all before it.

        Shape: (num_windows,)
        """
        digest, names = sha256(), np.empty(num_windows, dtype=np.int64)
        for number, window in enumerate(ids[: num_windows * self.window].reshape(-1, self.window)):
            digest.update(np.ascontiguousarray(window).tobytes())
            names[number] = -1 - (int.from_bytes(digest.digest()[:8], "big") >> 2)
        return names

    @torch.inference_mode()
    def _encode(self, before: IntArray, slots: IntArray, ids: IntArray) -> None:
        """Encode the visible tokens `ids` of one window behind the windows in `before`, and write both layers."""
        shape = self.pool.shape
        sizes = np.count_nonzero(slots.reshape(-1, shape.ratio) != NO_SLOT, axis=1)
        device = self.pool.landmark_k.device
        encoded = encode_window(
            self._model, self.rotary, self.landmarks, self.parts(before, choosing=False).context,
            torch.from_numpy(np.ascontiguousarray(ids)).to(device), torch.from_numpy(sizes[sizes > 0]), self.start,
        )  # fmt: skip
        host = self.pool.k.device
        self.pool.write(slots[slots != NO_SLOT], encoded.tokens.k.to(host), encoded.tokens.v.to(host))
        self.pool.write_landmarks(self.pool.landmark_rows(slots), encoded.landmarks.k, encoded.landmarks.v)

    def _tokens(self, slots: IntArray, positions: IntArray) -> States:
        k, v = (x.to(self.pool.landmark_k.device) for x in self.pool.read(slots))
        return States(k, v).placed(positions, self.rotary)
