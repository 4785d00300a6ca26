"""Contracts of the cache: the prefix index (integers only), thread keys, and the view that an eraser edits.

Three things are kept apart: the pool owns tensors, the index owns slot numbers, the manager joins them. A *slot* holds
K and V of one token in all layers; a *page* is `page_size` consecutive slots. `NO_SLOT` stands for a key entry
without KV: a hidden tombstone, invisible to attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..types import Interval

if TYPE_CHECKING:
    import torch

    from ..kernels import HeadMap
    from ..kernels.rope import Rotary

IntArray = NDArray[np.int64]
NO_SLOT = -1


@dataclass(frozen=True, slots=True, eq=False)
class ThreadKey:
    """What the engine is asked to hold for a thread: one entry per token or tombstone."""

    ids: IntArray
    """Token ids; negative ids are tombstones (see `cache.keys`). Shape: (num_entries,)"""
    positions: IntArray
    """Rotary position of each entry. Shape: (num_entries,)"""
    extra_key: str = ""
    """Namespace, as in SGLang: keys of different namespaces never match."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def next_position(self) -> int:
        """Position of the token that would follow."""
        return int(self.positions[-1]) + 1 if len(self.positions) else 0

    def cut(self, end: int) -> ThreadKey:
        """Return the key of the first `end` entries."""
        return ThreadKey(self.ids[:end], self.positions[:end], self.extra_key)


@dataclass(frozen=True, slots=True, eq=False)
class MatchResult:
    """Longest cached prefix of a key."""

    slots: IntArray
    """Slot of each matched entry, NO_SLOT for hidden tombstones; a copy. Shape: (num_matched,)"""
    node: Any
    """Opaque handle of the last node, for `inc_lock_ref`; valid until the next call unless locked."""


class PrefixCache(ABC):
    """Index from token ids to slots, shared by all threads (SGLang `mem_cache/base_prefix_cache.py`).

    Holds integers, never tensors, and frees nothing itself: slots it gives up are returned to the caller. Lengths are
    multiples of `page_size`; a tail shorter than a page is never indexed. Entries under a lock are never evicted.
    Sizes count slots, not key entries: hidden tombstones cost nothing.
    """

    page_size: int

    @abstractmethod
    def match_prefix(self, ids: IntArray, *, extra_key: str = "") -> MatchResult:
        """Return the longest indexed prefix, page-aligned, and count as a use of it for eviction.

        May split a node so that the match ends at a node boundary; splits change no other result.
        """

    @abstractmethod
    def insert(self, ids: IntArray, slots: IntArray, *, extra_key: str = "") -> int:
        """Index `ids` (page-aligned part only) under `slots`; takes ownership of the slots past the returned length.

        Returns:
            How many leading entries were indexed before. Those keep the slots they had: the caller's slots for them
            are still the caller's, to release where they differ.

        Raises:
            ValueError: `ids` and `slots` differ in length.
        """

    @abstractmethod
    def evict(self, num_slots: int) -> IntArray:
        """Drop unlocked leaves, in the order of the policy, until `num_slots` slots are given up or none is left.

        Returns:
            The slots given up as they were indexed: whole pages, NO_SLOT where an entry was hidden, so that each row
            of `reshape(-1, page_size)` is one reference to one page. The caller releases them.
        """

    @abstractmethod
    def inc_lock_ref(self, node: Any) -> None:
        """Protect the path from the root to `node` from eviction and removal; each call needs its `dec_lock_ref`."""

    @abstractmethod
    def dec_lock_ref(self, node: Any) -> None:
        """Undo one `inc_lock_ref`. Raises CacheIntegrityError where there is none to undo."""

    @abstractmethod
    def exclusive_from(self, ids: IntArray, *, extra_key: str = "", locks: int = 0) -> int:
        """Return the first entry from which on only this path uses the nodes.

        That is: below it no other branch hangs off, and no node is locked more than `locks` times (the caller's own
        locks). `len(matched)` where nothing is exclusive. Not a use for eviction.
        """

    @abstractmethod
    def remove_tail(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        """Remove the nodes of the path `ids` that lie at or after `start` and that nothing else uses or locks.

        Works upwards from the deepest matched node and stops at the first node with another child or a lock. `start`
        inside a page or node: only what lies wholly at or after the page boundary at or below `start` is removed
        (the boundary is split first).

        Returns:
            The slots given up, in the form of `evict`; the caller releases them.
        """

    @abstractmethod
    def remove_branches(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        """Remove what lies behind entry `start` of the path `ids`, and every other path that goes through that entry.

        Whatever was computed after reading the entry goes, whoever indexed it; what is locked, and what leads to it,
        stays. `start` inside a page: paths that share the whole page. Nothing is removed where the path is not indexed
        past `start`.

        Returns:
            The slots given up, in the form of `evict`; the caller releases them.
        """

    @property
    @abstractmethod
    def evictable_size(self) -> int:
        """Slots that eviction could give up now."""

    @property
    @abstractmethod
    def protected_size(self) -> int:
        """Slots under a lock."""

    @abstractmethod
    def held_slots(self) -> IntArray:
        """Return all indexed slots in the form of `evict`: a page indexed on two paths appears twice."""

    @abstractmethod
    def paths(self) -> Iterator[tuple[str, IntArray, IntArray]]:
        """Yield what is indexed, in a form that can be saved: every path that no other one continues.

        Paths whose ends were used longest ago come first, so that an empty index into which they are inserted in this
        order holds the same and evicts about the same. Not a use for eviction. The index must not change meanwhile.

        Yields:
            Namespace, ids and slots of a whole path, from its first entry on; copies. Shape of both: (num_entries,)
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise CacheIntegrityError where the index contradicts itself (sizes, locks, page alignment, links)."""


class EditView(ABC):
    """The cached part of one thread, opened for an edit; what erasers work on. They never see text.

    Indices are entries of the thread's key as it was before the edit. Writes go to slots that only this thread uses:
    in place where the path is exclusive, to fresh copies where others share it. The view belongs to the engine and is
    valid only inside `Engine.erase`. An exception anywhere leaves either the old path intact or the thread uncached
    from the first written entry on: never half an edit.
    """

    spans: Sequence[Interval]
    """The erased spans, in order, not overlapping, inside `[0, num_entries)`."""
    rotary: Rotary
    """How the model rotates its keys."""
    device: str
    """Where its KV is, as torch names it."""
    num_entries: int
    """Cached entries of the thread; entries past it are not cached and need no edit."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of the model whose KV this is: learned erasers belong to one."""

    @property
    @abstractmethod
    def followers(self) -> IntArray:
        """Visible entries after the first span and outside of all spans: what may have absorbed it. Shape: (n,)."""

    @property
    @abstractmethod
    def suffix(self) -> IntArray:
        """Those of the followers that are ordinary tokens and can be recomputed. Shape: (n,).

        The others are steering states of earlier edits.
        """

    @abstractmethod
    def positions(self) -> IntArray:
        """Current rotary position of every entry, with moves applied. Shape: (num_entries,)."""

    @abstractmethod
    def hide(self, start: int, end: int) -> None:
        """Make `[start, end)` invisible to attention and give its slots up. Positions stay."""

    @abstractmethod
    def move(self, index: IntArray, offset: IntArray) -> None:
        """Add `offset` to the positions of the entries `index` and rotate their cached keys to match.

        Exact for rotary embeddings: R(p + d) k = R(d) R(p) k (RoFormer, arXiv 2104.09864, eq. 16).
        """

    @abstractmethod
    def read(self, index: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of the cached K (rotated) and V.

        Returns:
            Shape of each: (num_layers, len(index), num_kv_heads, head_dim), in the pool's dtype.
        """

    @abstractmethod
    def write(self, index: IntArray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite cached K (rotated for the entries' positions) and V. Shapes as in `read`."""

    def map_states(self, index: IntArray, weights: HeadMap) -> None:
        """Overwrite cached K and V by a map of themselves, head by head, on keys without rotation.

        By `read` and `write`, unless the engine has a kernel for it.

        Args:
            index: entries.
            weights: of the map, on the view's device.
        """
        import torch

        from ..kernels.reference import map_rotated

        positions = torch.from_numpy(self.positions()[index]).to(self.device)
        self.write(index, *map_rotated(*self.read(index), positions, weights, self.rotary))

    @abstractmethod
    def recompute(self, index: IntArray) -> None:
        """Run the ordinary tokens at `index` through the model and overwrite their KV.

        Each attends to all visible entries before it, with what has been written so far, and to the recomputed
        tokens before it. Index ascending; spans and tombstones are refused with a SpanError.
        """

    @abstractmethod
    def reencode(self, patch: Callable[[Any], AbstractContextManager[None]], *, sees_suffix: bool) -> None:
        """Run the tokens of all erased spans through a patched model and overwrite their KV: steering states.

        Each attends to the visible entries before it, steering states of earlier spans and its own span's earlier
        tokens in place of what was there.

        Args:
            patch: takes the model; while its context is entered, the model's forward pass is another one.
            sees_suffix: each token attends also to what follows, but for later tokens of erased spans.
        """

    @abstractmethod
    def deviation(self, index: IntArray, layer: int = 1) -> torch.Tensor:
        """Measure how far the KV of one layer would move if the entries `index` were recomputed now; writes nothing.

        Runs the model up to `layer` only. Returns the relative L2 change of K and V together, on keys at current
        positions. Shape: (len(index),), float32.
        """

    @abstractmethod
    def rebuild(self) -> None:
        """Forget everything from the first span on and prefill what is left without the spans: full recomputation."""
