"""Embedded engine: a transformers decoder over a paged, prefix-shared KV cache, on CPU or CUDA."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..cache.base import NO_SLOT, IntArray, ThreadKey
from ..cache.lease import Lease
from ..cache.manager import CacheManager
from ..cache.pool import PagedKVPool
from ..cache.radix import RadixCache
from ..errors import ColdTombstoneError, PoolExhaustedError, SpanError
from ..types import EraseResult, Interval, SamplingParams
from .attribution import check_attribution, strongest_shares
from .base import (
    ExtendResult,
    GeneratedToken,
    LocalEngine,
    LogitsProcessor,
    SupportsErase,
    check_edit,
    check_warm,
    end_of_edit,
)
from .decoding import decode
from .edit import HFEditView
from .sampling import Sampler
from .support import inspect_model
from .working import Buffers, ModelRunner, WorkingSet

_ANSWER_ROWS = 1024
"""Most rows that are reserved for an answer before it is decoded; a longer one moves its context now and then."""
_ANSWER_SLOTS = 16
"""Slots that an answer is given at a time."""


class HFEngine(LocalEngine):
    """Runs one transformers causal LM for many threads.

    Decoding streams of several threads may be open at once; their forward passes take turns. Memory is bounded: the
    pool holds `max_tokens` tokens, and least recently used threads are evicted from it.

    Args:
        model: a causal LM, loaded with `attn_implementation="sdpa"` (or eager), in float32 or bfloat16.
        max_tokens: size of the KV pool, in tokens.
        page_size: tokens per page; 1 keeps edits exact to the token, larger pages leave the partial page at the end
            of a thread uncached.
        eviction: `lru` or `lfu`.
        chunk_size: most tokens in one forward pass of a prefill.
        name: how the model is called in messages and results.

    Raises:
        UnsupportedModelError: the model cannot be edited correctly.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_tokens: int = 65_536,
        page_size: int = 1,
        eviction: str = "lru",
        chunk_size: int = 1024,
        name: str = "",
    ) -> None:
        if max_tokens < page_size or chunk_size < 1:
            raise ValueError(
                f"max_tokens must be at least one page and chunk_size 1, got {max_tokens} and {chunk_size}"
            )
        self.model = model.eval()
        self.spec, self.rotary = inspect_model(model, name=name)
        self.runner = ModelRunner(model)
        self.chunk_size = chunk_size
        self._pool = PagedKVPool(
            num_layers=self.spec.num_layers, num_kv_heads=self.spec.num_kv_heads, head_dim=self.spec.head_dim,
            num_pages=max_tokens // page_size, page_size=page_size, dtype=model.dtype, device=self.spec.device,
        )  # fmt: skip
        self._manager = CacheManager(self._pool, RadixCache(page_size=page_size, eviction=eviction))
        self._buffers = Buffers()
        self.lock = threading.RLock()

    def cached(self, key: ThreadKey) -> int:
        """Return how many leading entries are cached."""
        with self.lock:
            return self._manager.match(key.ids, extra_key=key.extra_key)

    def extend(self, key: ThreadKey, *, num_last: int = 1) -> ExtendResult:
        """Prefill what is missing."""
        with self.lock:
            lease = self._manager.lease(key.ids, extra_key=key.extra_key)
            try:
                result, working = self._prefill(lease, key, num_last)
                working.close()
            except BaseException:
                self._manager.release(lease, keep=lease.num_cached)
                raise
            self._manager.release(lease)
            return result

    def generate(
        self, key: ThreadKey, sampling: SamplingParams, *, logits_processor: LogitsProcessor | None = None
    ) -> Iterator[GeneratedToken]:
        """Extend and decode."""
        sampler = Sampler(sampling, self.spec.device)
        with self.lock:
            lease = self._manager.lease(key.ids, extra_key=key.extra_key)
        filled, answer_from, working = lease.num_cached, 0, None
        try:
            with self.lock:
                room = min(sampling.max_tokens, _ANSWER_ROWS)
                result, working = self._prefill(lease, key, 1, room=room)
                self._manager.publish(lease)
                filled, answer_from = len(key), working.length

            def forward(token: int) -> torch.Tensor:
                nonlocal filled
                with self.lock:
                    position = key.next_position + filled - len(key)
                    logits = self._decode(lease, working, filled, token, position, end=len(key) + sampling.max_tokens)
                    filled += 1
                return logits

            yield from decode(
                result.logits[0], forward, sampler, sampling, room=self.spec.max_positions - key.next_position,
                num_cached_tokens=result.num_cached_tokens, logits_processor=logits_processor,
            )  # fmt: skip
        finally:
            with self.lock:
                self._end(lease, working, answer_from, len(key), filled)

    def erase(
        self, key: ThreadKey, spans: Sequence[Interval], eraser: SupportsErase, new_key: ThreadKey
    ) -> EraseResult:
        """Edit and commit under the new key."""
        check_edit(key, spans, eraser, new_key)
        started = time.perf_counter()
        with self.lock:
            cached = end_of_edit(self._manager.match(key.ids, extra_key=key.extra_key), spans, self._pool.page_size)
            whole = [(start, end) for start, end in spans if end <= cached]
            erased = sum(end - start for start, end in whole)
            if not whole:
                freed = self.drop(key, cached)
                return EraseResult(eraser_id=eraser.eraser_id, slots_freed=freed, exact=True)
            counts = self._edit(key, cached, whole, eraser, new_key)
        return EraseResult(
            eraser_id=eraser.eraser_id, tokens_erased=erased, exact=eraser.exact,
            edit_ms=(time.perf_counter() - started) * 1e3, **counts,
        )  # fmt: skip

    def drop(self, key: ThreadKey, start: int) -> int:
        """Forget the exclusive tail."""
        with self.lock:
            self._buffers.forget()
            return self._manager.drop(key.ids, start, extra_key=key.extra_key)

    def purge(self, key: ThreadKey, start: int) -> int:
        """Forget the tail and its branches."""
        with self.lock:
            self._buffers.forget()
            return self._manager.purge(key.ids, start, extra_key=key.extra_key)

    def read_kv(self, key: ThreadKey, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy K and V out."""
        with self.lock:
            slots = self._slots(key, start, end)
            return self._pool.read(slots[slots != NO_SLOT])

    def write_kv(self, key: ThreadKey, start: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite K and V in place, for everyone who shares the path."""
        with self.lock:
            slots = self._slots(key, start, end)
            if np.any(slots == NO_SLOT):
                raise SpanError(f"[{start}, {end}) holds hidden tombstones, which have no KV to write")
            self._pool.write(slots, k, v)

    def attention(self, key: ThreadKey, span: Interval, entries: IntArray) -> torch.Tensor | None:
        """Return shares of attention (`SupportsAttribution`); the model must run with sdpa."""
        check_attribution(key, span, entries)
        end = int(entries[-1]) + 1
        with self.lock:
            if self.cached(key) < end:
                return None
            slots = self._slots(key, 0, end)
            with WorkingSet(self._pool, slots, buffers=self._buffers) as working:
                return strongest_shares(self.runner, working, key, slots, span, entries, chunk_size=self.chunk_size)

    def check_integrity(self) -> None:
        """Check the conservation laws of pool and tree."""
        with self.lock:
            self._manager.check_integrity()

    def tokens_in_use(self) -> int:
        """Slots in use."""
        with self.lock:
            return self._manager.tokens_in_use()

    @property
    def manager(self) -> CacheManager:
        """The cache itself, for benchmarks and tests; hold no lease across calls of the engine."""
        return self._manager

    def _prefill(
        self, lease: Lease, key: ThreadKey, num_last: int, *, room: int = 0
    ) -> tuple[ExtendResult, WorkingSet]:
        """Run the uncached part of `key` (and at least `num_last` entries); the new KV is in the lease's slots.

        Returns:
            What came of it; and the KV of the thread, with `room` rows to decode into.
        """
        n, cached = len(key), lease.num_cached
        if not 1 <= num_last <= n:
            raise ValueError(f"num_last must be in [1, {n}] for a key of {n} entries, got {num_last}")
        if key.next_position > self.spec.max_positions:
            raise ValueError(
                f"the thread needs {key.next_position} positions but model {self.spec.name!r} has "
                f"{self.spec.max_positions}; shorten the thread"
            )
        start = min(cached, n - num_last)
        check_warm(key.ids[start:], start)
        new_slots = self._manager.append(lease, key.ids[cached:]) if cached < n else np.empty(0, np.int64)
        working = WorkingSet(self._pool, lease.slots[:start], capacity=len(lease.slots) + room, buffers=self._buffers)
        rows = working.length + np.arange(n - start)
        logits: list[torch.Tensor] = []
        for at in range(0, n - start, self.chunk_size):
            part = slice(at, min(at + self.chunk_size, n - start))
            wanted = max(0, part.stop - max(part.start, n - start - num_last))
            out = self.runner.forward(
                working, key.ids[start:][part], key.positions[start:][part], rows[part], num_logits=max(wanted, 1)
            )
            assert out is not None, "no stop layer was asked for"
            if wanted:
                logits.append(out)
        fresh = slice(working.length - len(new_slots), working.length)
        self._pool.write(new_slots, working.k[:, fresh], working.v[:, fresh])
        result = ExtendResult(logits=torch.cat(logits), num_cached_tokens=start, num_prefilled_tokens=n - start)
        return result, working

    def _decode(
        self, lease: Lease, working: WorkingSet, entry: int, token: int, position: int, *, end: int
    ) -> torch.Tensor:
        """Run one token as an entry of the lease, which is given slots for several; its KV stays in the working set."""
        ids = np.array([token])
        if entry == len(lease):
            try:
                self._manager.append(lease, np.full(min(_ANSWER_SLOTS, max(1, end - entry)), token))
            except PoolExhaustedError:
                self._manager.append(lease, ids)
        lease.put(entry, token)
        logits = self.runner.forward(working, ids, np.array([position]), np.array([working.length]))
        assert logits is not None, "no stop layer was asked for"
        return logits[0]

    def _end(self, lease: Lease, working: WorkingSet | None, row: int, start: int, filled: int) -> None:
        """Write the KV of an answer, the entries from `start` on and rows from `row` on, and end its sequence.

        Once for the whole answer: nobody else reads its slots before the lease is released.
        """
        keep = min(start, filled)
        try:
            if working is not None and filled > start:
                rows = slice(row, row + filled - start)
                self._pool.write(lease.slots[start:filled], working.k[:, rows], working.v[:, rows])
                keep = filled
        finally:
            self._manager.release(lease, keep=keep)
            if working is not None:
                working.close()

    def _edit(
        self, key: ThreadKey, cached: int, spans: list[Interval], eraser: SupportsErase, new_key: ThreadKey
    ) -> dict[str, int]:
        first = spans[0][0]
        if cached < self._manager.match(key.ids, extra_key=key.extra_key):
            self._manager.drop(key.ids, cached, extra_key=key.extra_key)
        old = key.cut(cached)
        with self._manager.open_edit(old.ids, extra_key=key.extra_key, start=first) as path:
            view = HFEditView(old, spans, path, self._pool, self.runner, self.rotary, self.chunk_size, self._buffers)
            if not (eraser.suffix_free and self._manager.match(new_key.ids, extra_key=key.extra_key) >= spans[-1][1]):
                eraser.erase(view)
            if not view.rebuild_asked:
                _check_positions(view.positions(), path.slots, new_key)
                freed = path.commit(new_key.ids[:cached])
        if view.rebuild_asked:
            freed = self._manager.drop(key.ids, first, extra_key=key.extra_key)
            left = cached - sum(end - start for start, end in spans)
            view.tokens_recomputed += self._prefill_again(new_key.cut(left)) if left > first else 0
        return {
            "tokens_recomputed": view.tokens_recomputed,
            "tokens_moved": view.tokens_moved,
            "slots_copied": path.slots_copied,
            "slots_freed": freed,
        }

    def _prefill_again(self, key: ThreadKey) -> int:
        """Prefill the rest of a path that was cut off; return the tokens it took.

        The page at the cut went as a whole. Where an earlier tombstone was in it, nothing is prefilled: that span has
        to leave the key first, as whoever builds the next key finds out.
        """
        try:
            return self.extend(key).num_prefilled_tokens
        except ColdTombstoneError:
            return 0

    def _slots(self, key: ThreadKey, start: int, end: int) -> IntArray:
        lease = self._manager.lease(key.ids, extra_key=key.extra_key)
        try:
            if not 0 <= start <= end <= lease.num_cached:
                raise SpanError(
                    f"[{start}, {end}) is not cached: of the key's {len(key)} entries {lease.num_cached} are"
                )
            return lease.slots[start:end].copy()
        finally:
            self._manager.release(lease, keep=lease.num_cached)


def _check_positions(positions: IntArray, slots: IntArray, new_key: ThreadKey) -> None:
    visible = slots != NO_SLOT
    wrong = np.flatnonzero(visible & (positions != new_key.positions[: len(positions)]))
    if len(wrong):
        raise ValueError(
            f"after the edit entry {wrong[0]} is rotated for position {positions[wrong[0]]} but the new key says "
            f"{new_key.positions[wrong[0]]}; does the eraser's closes_gap tell the truth?"
        )
