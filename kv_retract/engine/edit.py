"""The embedded engine's view of one edit: what erasers call, on pages that only the edited thread uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from ..cache.base import NO_SLOT, EditView, IntArray, ThreadKey
from ..cache.edit import PathEdit
from ..cache.keys import is_tombstone
from ..cache.pool import PagedKVPool
from ..errors import SpanError
from ..kernels import HeadMap
from ..kernels.rope import Rotary
from ..types import Interval
from .working import Buffers, ModelRunner, WorkingSet


class HFEditView(EditView):
    """Edits one `PathEdit`; see `EditView` for the contract.

    Args:
        key: the thread before the edit, cut to its cached part.
        spans: intervals of `key`.
        path: its pages, copied on write.
        pool, runner, rotary: of the engine.
        chunk_size: most tokens in one forward pass.
        buffers: for working sets.
    """

    def __init__(
        self,
        key: ThreadKey,
        spans: Sequence[Interval],
        path: PathEdit,
        pool: PagedKVPool,
        runner: ModelRunner,
        rotary: Rotary,
        chunk_size: int,
        buffers: Buffers,
    ) -> None:
        self.spans = tuple(spans)
        self.rotary = rotary
        self.device = str(pool.k.device)
        self.num_entries = len(key)
        self.rebuild_asked = False
        self.tokens_recomputed = 0
        self.tokens_moved = 0
        self._ids = key.ids
        self._positions = key.positions.copy()
        self._path, self._pool, self._runner = path, pool, runner
        self._chunk, self._buffers = chunk_size, buffers
        self._in_span = np.zeros(self.num_entries, dtype=np.bool_)
        for start, end in self.spans:
            self._in_span[start:end] = True

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return self._runner.fingerprint

    @property
    def followers(self) -> IntArray:
        """Visible entries after the first span, outside of all spans."""
        after = np.arange(self.num_entries) >= self.spans[0][1]
        return np.flatnonzero(after & ~self._in_span & (self._path.slots != NO_SLOT))

    @property
    def suffix(self) -> IntArray:
        """Those of them that are ordinary tokens."""
        followers = self.followers
        return followers[~is_tombstone(self._ids[followers])]

    def positions(self) -> IntArray:
        """Current rotary position of every entry."""
        return self._positions.copy()

    def hide(self, start: int, end: int) -> None:
        """Make `[start, end)` invisible."""
        self._check(np.arange(start, end))
        self._path.hide(start, end)

    def move(self, index: IntArray, offset: IntArray) -> None:
        """Shift positions and rotate the keys to match."""
        self._check(index)
        if not len(index):
            return
        old = self._positions[index]
        self._positions[index] += offset
        pool = self._pool
        slots, old_places, new_places = (pool.index(x) for x in (self._path.own(index), old, self._positions[index]))
        pool.kernels.gather_rotate(pool.paged, slots, old_places, new_places, self.rotary)
        self.tokens_moved += len(index)

    def read(self, index: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy K and V out."""
        self._check(index, visible=True)
        return self._pool.read(self._path.slots[index])

    def write(self, index: IntArray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite K and V."""
        self._check(index)
        expected = (self._pool.k.shape[0], len(index), *self._pool.k.shape[2:])
        if tuple(k.shape) != expected or tuple(v.shape) != expected:
            raise ValueError(f"K and V must have shape {expected}, got {tuple(k.shape)} and {tuple(v.shape)}")
        self._pool.write(self._path.own(index), k, v)
        self.tokens_moved += len(index)

    def map_states(self, index: IntArray, weights: HeadMap) -> None:
        """Map K and V from where they are to where this thread may write."""
        self._check(index, visible=True)
        pool = self._pool
        source, places = pool.index(self._path.slots[index]), pool.index(self._positions[index])
        pool.kernels.kv_map(pool.paged, source, pool.index(self._path.own(index)), places, weights, self.rotary)
        self.tokens_moved += len(index)

    def recompute(self, index: IntArray) -> None:
        """Run tokens through the model again and overwrite their KV."""
        self._check(index, ordinary=True)
        if not len(index):
            return
        with self._working(int(index[-1]) + 1) as working:
            rows = self._rows()
            for part in self._chunks(index):
                self._runner.forward(working, self._ids[part], self._positions[part], rows[part])
            self._pool.write(self._path.own(index), working.k[:, rows[index]], working.v[:, rows[index]])
        self.tokens_recomputed += len(index)

    def reencode(self, patch: Callable[[Any], AbstractContextManager[None]], *, sees_suffix: bool) -> None:
        """Overwrite the spans' KV by what a patched model writes."""
        index, rows = np.flatnonzero(self._in_span), self._rows()
        span_rows = torch.from_numpy(rows[index])
        end = self.num_entries if sees_suffix else self.spans[-1][1]
        with self._working(end) as working, patch(self._runner.model):
            for part in self._chunks(index):
                visible = None
                if sees_suffix:
                    visible = torch.ones(len(part), working.length, dtype=torch.bool)
                    visible[:, span_rows] = span_rows[None] <= torch.from_numpy(rows[part])[:, None]
                self._runner.forward(
                    working, self._ids[part], self._positions[part], rows[part], visible=visible,
                    stop_layer=self._runner.num_layers - 1,
                )  # fmt: skip
            self._pool.write(self._path.own(index), working.k[:, rows[index]], working.v[:, rows[index]])
        self.tokens_recomputed += len(index)

    def deviation(self, index: IntArray, layer: int = 1) -> torch.Tensor:
        """Relative change of one layer's KV under recomputation."""
        self._check(index, ordinary=True)
        if not 0 <= layer < self._runner.num_layers:
            raise ValueError(f"layer must be in [0, {self._runner.num_layers}), got {layer}")
        rows = self._rows()
        at = torch.from_numpy(rows[index])
        with self._working(int(index[-1]) + 1 if len(index) else 0) as working:
            before = torch.cat((working.k[layer, at], working.v[layer, at]), dim=-1).float()
            for part in self._chunks(index):
                self._runner.forward(working, self._ids[part], self._positions[part], rows[part], stop_layer=layer)
            after = torch.cat((working.k[layer, at], working.v[layer, at]), dim=-1).float()
        change = (after - before).flatten(1).norm(dim=1)
        relative: torch.Tensor = change / before.flatten(1).norm(dim=1).clamp_min(1e-12)
        return relative.cpu()

    def rebuild(self) -> None:
        """Ask the engine to prefill the rest anew."""
        self.rebuild_asked = True

    def _working(self, end: int) -> WorkingSet:
        """Gather what is visible now of the first `end` entries: no token sees more than those before it."""
        return WorkingSet(self._pool, self._path.slots[:end], buffers=self._buffers)

    def _rows(self) -> IntArray:
        """Return the row of each entry in such a working set; meaningless where it is hidden."""
        rows: IntArray = np.cumsum(self._path.slots != NO_SLOT) - 1
        return rows

    def _chunks(self, index: IntArray) -> list[IntArray]:
        return [index[i : i + self._chunk] for i in range(0, len(index), self._chunk)]

    def _check(self, index: IntArray, *, visible: bool = False, ordinary: bool = False) -> None:
        if len(index) == 0:
            return
        if index[0] < 0 or index[-1] >= self.num_entries or np.any(np.diff(index) <= 0):
            raise SpanError(f"entries must ascend inside [0, {self.num_entries}), got {index[0]} to {index[-1]}")
        if (visible or ordinary) and np.any(self._path.slots[index] == NO_SLOT):
            raise SpanError("some of the entries are hidden: they have no KV to read or recompute")
        if ordinary and (np.any(is_tombstone(self._ids[index])) or np.any(self._in_span[index])):
            raise SpanError(
                "tombstones and erased spans cannot be recomputed: their text must not reach the model again"
            )
