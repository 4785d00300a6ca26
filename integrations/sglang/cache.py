"""A radix cache of SGLang whose paths can be edited: the tree's half of a span retraction.

Works with the Rust core and the Python core of `UnifiedRadixCache`. The Rust core shows no node objects, so the cache
remembers where the inserts of each namespace ended; from there `collect_path_info` leads to every node.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, InsertResult, MatchPrefixParams, TreeLock
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId, TreePathNodeInfo
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from .refusal import Refused


class Namespace(NamedTuple):
    """What keeps threads apart in the tree."""

    extra_key: str | None
    cache_salt: str | None = None


class CachedPath(NamedTuple):
    """The longest cached beginning of a key."""

    node: NodeId
    slots: torch.Tensor
    """Of the pool, one per token. Shape: (num_cached,), int64"""


class Subtree(NamedTuple):
    """Nodes at and below a place of a path."""

    nodes: tuple[TreePathNodeInfo, ...]
    """Deepest first."""
    exclusive: bool
    """Whether they are all on that one path."""


_FIRST_SWEEP = 64


class RetractableRadixCache(UnifiedRadixCache):
    """`UnifiedRadixCache` with the operations that a span retraction is made of. Ordinary traffic passes through."""

    def __init__(self, params: CacheInitParams) -> None:
        self._forget_ends()
        super().__init__(params)

    def insert(self, params: InsertParams) -> InsertResult:
        """As SGLang's; remembers where it ended."""
        result = super().insert(params)
        if params.key is not None and result.last_device_node is not None:
            namespace = Namespace(params.key.extra_key, params.key.cache_salt)
            ends = self._ends.setdefault(namespace, {})
            ends[result.last_device_node] = None
            if len(ends) >= self._sweep_at.get(namespace, _FIRST_SWEEP):
                self._paths(namespace)
                self._sweep_at[namespace] = max(_FIRST_SWEEP, 2 * len(ends))
        return result

    def reset(self) -> None:
        """As SGLang's."""
        self._forget_ends()
        super().reset()

    def locate(self, ids: Sequence[int], namespace: Namespace) -> CachedPath:
        """Return what is cached of a key; counts as a use."""
        match = self.match_prefix(MatchPrefixParams(key=_key(ids, namespace)))
        slots = self.path_device_indices(match.last_device_node)
        assert len(slots) == match.device_prefix_len, "a match ends at a node"
        return CachedPath(match.last_device_node, slots)

    def path(self, ids: Sequence[int], namespace: Namespace) -> tuple[TreePathNodeInfo, ...]:
        """Return the nodes of the cached beginning of a key, from the root on."""
        return self.tree_core.collect_path_info([self.locate(ids, namespace).node])[0]

    def subtree(self, ids: Sequence[int], start: int, namespace: Namespace) -> Subtree:
        """Return the nodes at and below entry `start` of the cached path `ids`, split so that one begins there.

        Raises:
            Refused: a node below hangs where no insert of this namespace ended.
        """
        self.locate(ids[:start], namespace)  # forces a border of nodes at `start`
        path = self.path(ids, namespace)
        own = {node.node_id for node in path if node.path_start >= start}
        if not own:
            return Subtree((), True)
        first = next(node.node_id for node in path if node.path_start >= start)
        found: dict[NodeId, TreePathNodeInfo] = {}
        for other in self._paths(namespace):
            at = [node.node_id for node in other]
            if first in at:
                found.update((node.node_id, node) for node in other[at.index(first) :])
        children: dict[NodeId, int] = {}
        for node in found.values():
            children[node.parent_id] = children.get(node.parent_id, 0) + 1
        if not own <= found.keys() or any(n.num_children != children.get(n.node_id, 0) for n in found.values()):
            raise Refused("unsupported", "the tree below the span holds nodes that no insert of this thread made")
        nodes = tuple(sorted(found.values(), key=lambda node: -node.path_start))
        return Subtree(nodes, found.keys() == own)

    def is_locked(self, nodes: Sequence[TreePathNodeInfo]) -> bool:
        """Whether a running request holds one of the nodes."""
        if not nodes:
            return False
        unlocked = self.tree_core.walk_for_kv_canary(unlocked_only=True, swa_resident_only=False).slot_indices
        own = torch.cat([self.path_device_indices(node.node_id)[node.path_start :] for node in nodes])
        return not bool(torch.isin(own, unlocked.to(own.dtype)).all())

    def hold(self, node: NodeId) -> TreeLock | None:
        """Protect a path from eviction until `unlock`."""
        return self.lock(node)

    def reserve(self, num_slots: int) -> torch.Tensor:
        """Take slots of the pool, evicting where it is full; return them. Shape: (num_slots,).

        Raises:
            Refused: there is no room.
        """
        allocator = self.token_to_kv_pool_allocator
        slots = allocator.alloc(num_slots)
        if slots is None:
            self.evict(EvictParams(num_tokens=num_slots))
            slots = allocator.alloc(num_slots)
        if slots is None:
            raise Refused("no_room", f"the pool has no room for {num_slots} tokens beside what running requests hold")
        return slots

    def detach(self, nodes: Sequence[TreePathNodeInfo]) -> torch.Tensor:
        """Take unlocked nodes out of the tree, deepest first; return their slots, which the caller now owns."""
        parts = [torch.empty(0, dtype=torch.int64, device=self.device)]
        for node in nodes:
            result = self.tree_core.evict_device_leaf(node.node_id, self.is_write_back)
            assert result.backup_kv is None, "caches with a host tier are refused"
            parts += result.device_frees.pop(ComponentType.FULL, [])
            self._apply_eviction_result(result)
        return torch.cat(parts)

    def attach(self, ids: Sequence[int], slots: torch.Tensor, known: int, namespace: Namespace) -> None:
        """Put a path into the tree whose first `known` entries are cached; duplicates of later ones are freed."""
        self.insert(InsertParams(key=_key(ids, namespace), value=slots.to(torch.int64), prev_prefix_len=known))

    def give_back(self, slots: torch.Tensor) -> int:
        """Zero slots and return them to the pool, so that no retracted text stays behind; return their number."""
        if len(slots):
            pool = self.token_to_kv_pool_allocator.get_kvcache()
            for k, v in zip(pool.k_buffer, pool.v_buffer, strict=True):
                k[slots] = 0
                v[slots] = 0
            self.token_to_kv_pool_allocator.free(slots)
        return len(slots)

    def _forget_ends(self) -> None:
        self._ends: dict[Namespace, dict[NodeId, None]] = {}
        self._sweep_at: dict[Namespace, int] = {}

    def _paths(self, namespace: Namespace) -> list[tuple[TreePathNodeInfo, ...]]:
        """Return all paths of a namespace, and forget ends that are gone."""
        ends, paths = self._ends.get(namespace, {}), []
        for end in list(ends):
            try:
                paths += self.tree_core.collect_path_info([end])
            except KeyError:
                del ends[end]
        return paths


def _key(ids: Sequence[int], namespace: Namespace) -> RadixKey:
    return RadixKey(array("q", ids), namespace.extra_key, cache_salt=namespace.cache_salt)
