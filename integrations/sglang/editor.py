"""The scheduler's half of a span retraction: edits of cached paths, between two batches, all or nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kv_retract.cache.base import IntArray
from kv_retract.engine.base import end_of_edit
from kv_retract.types import Interval

from . import api
from .cache import Namespace, RetractableRadixCache
from .pool import KVPool
from .refusal import Refused
from .steering import Steering


class PathEditor:
    """Edits cached paths of one rank.

    Args:
        cache: of the scheduler.
        kv: what its slots hold.
        steering: the learned eraser; None: there is none.
    """

    def __init__(self, cache: RetractableRadixCache, kv: KVPool, steering: Steering | None) -> None:
        self.cache, self.kv, self.steering = cache, kv, steering

    def edit(
        self,
        ids: Sequence[int],
        spans: Sequence[Interval],
        new_ids: Sequence[int],
        namespace: Namespace,
        *,
        steer: bool,
        purge: bool = False,
    ) -> api.EditAnswer:
        """Rewrite spans of a cached path and commit it under a new key.

        Slots outside of the spans move to the new key without a copy where no other path uses them, else what follows
        the first span is copied.

        Args:
            ids: the key, spans in place.
            spans: intervals of it, in order; those that are not wholly cached are ignored.
            new_ids: the key afterwards: tombstones in the spans, and nothing else changed.
            namespace: of both.
            steer: write steering states. False: the spans' KV stays as it is.
            purge: forget other paths of the namespace that went through the first span.

        Raises:
            Refused: nothing of the spans is cached, a running request holds the path, there is no room, or no eraser.
        """
        started = time.perf_counter()
        if steer and self.steering is None:
            raise Refused("unsupported", "the server was started without an eraser; pass --eraser to kv-retract serve")
        cached = end_of_edit(len(self.cache.locate(ids, namespace).slots), spans)
        whole = [(start, end) for start, end in spans if end <= cached]
        if not whole:
            raise Refused("not_cached", f"of {len(ids)} entries {cached} are cached, and no whole span among them")
        ids, new_ids, first = list(ids[:cached]), list(new_ids[:cached]), whole[0][0]
        below = self.cache.subtree(ids, first, namespace)
        copy = not (below.exclusive or purge)
        if not copy and self.cache.is_locked(below.nodes):
            raise Refused("busy", "a running request holds the path; finish or abort it, then try again")
        path = self.cache.locate(ids, namespace)
        renewed, kept = _changed(len(path.slots), whole, steer=steer, copy=copy)
        lock = self.cache.lock(path.node)
        try:
            fresh = self.cache.reserve(len(renewed))
        finally:
            self.cache.unlock(lock)
        try:
            # Making room may have evicted other paths: what is taken out is what is left of them.
            nodes = () if copy else self.cache.subtree(ids, first, namespace).nodes
            old, staged = self.cache.slots_of(nodes), path.slots.clone()
            staged[torch.from_numpy(renewed).to(staged.device)] = fresh.to(staged.dtype)
            gone = old[~torch.isin(old, staged)]  # the host waits here, and not once something is in line
            counts = self._write(ids, whole, path.slots, staged, kept, steer=steer)
            self.cache.detach(nodes)
        except BaseException:
            self._give_back(fresh)
            raise
        freed = self._give_back(gone)
        self.cache.attach(new_ids, staged, first, namespace)
        return api.EditAnswer(
            tokens_erased=sum(end - start for start, end in whole), slots_freed=freed,
            slots_copied=len(fresh) - steer * sum(end - start for start, end in whole),
            edit_ms=(time.perf_counter() - started) * 1e3, **counts,
        )  # fmt: skip

    def drop(self, ids: Sequence[int], start: int, namespace: Namespace, *, branches: bool) -> int:
        """Forget the cached entries of a key from `start` on, zero them, return how many slots became free.

        Args:
            ids: the key.
            start: first entry to go.
            namespace: of the key.
            branches: also what other keys cached that go through entry `start`; else only what no other path uses.

        Raises:
            Refused: a running request holds some of it.
        """
        if len(self.cache.locate(ids, namespace).slots) <= start:
            return 0
        below = self.cache.subtree(ids, start, namespace)
        nodes = below.nodes
        if not branches and not below.exclusive:
            nodes = self._own_tail(ids, start, namespace)
        if self.cache.is_locked(nodes):
            raise Refused("busy", "a running request holds the path; finish or abort it, then try again")
        return self._release(nodes)

    def forget(self, extra_key: str) -> int:
        """Forget all that is cached of a thread that no request runs in; return how many slots became free."""
        spaces = self.cache.namespaces_of(extra_key)
        return sum(self._release(self.cache.nodes_of(space)) for space in spaces)

    def _own_tail(self, ids: Sequence[int], start: int, namespace: Namespace) -> Sequence[Any]:
        """Return the nodes of a path past its last fork, deepest first."""
        nodes = self.cache.path(ids, namespace)
        tail: list[Any] = []
        for node in reversed(nodes):
            if node.path_start < start or node.num_children > len(tail[-1:]):
                break
            tail.append(node)
        return tail

    def _write(
        self,
        ids: list[int],
        spans: Sequence[Interval],
        slots: torch.Tensor,
        staged: torch.Tensor,
        kept: IntArray,
        *,
        steer: bool,
    ) -> dict[str, int]:
        """Fill the new slots of a path: `kept` entries by copies, spans by steering states; return counts."""
        index = torch.from_numpy(kept).to(slots.device)
        self.kv.copy(slots[index], staged[index])
        if not steer:
            return {"tokens_recomputed": 0, "tokens_moved": 0}
        assert self.steering is not None, "checked by edit"
        return self.steering.write(ids, spans, slots, staged)

    def _release(self, nodes: Sequence[Any]) -> int:
        """Take nodes out of the tree and give their slots back; return how many that is."""
        slots = self.cache.slots_of(nodes)
        self.cache.detach(nodes)
        return self._give_back(slots)

    def _give_back(self, slots: torch.Tensor) -> int:
        """Zero slots and return them to the pool, so that no retracted text stays behind; return their number."""
        self.kv.wipe(slots)
        if len(slots):
            self.cache.token_to_kv_pool_allocator.free(slots)
        return len(slots)


def _changed(length: int, spans: Sequence[Interval], *, steer: bool, copy: bool) -> tuple[IntArray, IntArray]:
    """Return which entries of a path get slots of their own, and which of them keep what they hold."""
    written, renewed = np.zeros((2, length), dtype=np.bool_)
    for start, end in spans if steer else ():
        written[start:end] = renewed[start:end] = True
    if copy:
        renewed[spans[0][0] :] = True
    return np.flatnonzero(renewed), np.flatnonzero(renewed & ~written)
