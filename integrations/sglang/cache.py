"""A radix cache of SGLang whose paths can be edited: the tree's half of a span retraction.

Works with the Rust core and the Python core of `UnifiedRadixCache`. The Rust core shows no node objects, so the cache
keeps the ids of each namespace's nodes itself: nodes are born where an insert or a match ends, or above, and go when
they are evicted.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
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


class RetractableRadixCache(UnifiedRadixCache):
    """`UnifiedRadixCache` with the operations that a span retraction is made of. Ordinary traffic passes through."""

    service: Any = None
    """The `SpanService` of the scheduler, for hooks that see the cache only."""

    def __init__(self, params: CacheInitParams) -> None:
        self._forget_nodes()
        super().__init__(params)

    def insert(self, params: InsertParams) -> InsertResult:
        """As SGLang's; remembers the nodes of the path."""
        result = super().insert(params)
        if params.key is not None and result.last_device_node is not None:
            self._remember(result.last_device_node, Namespace(params.key.extra_key, params.key.cache_salt))
        return result

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """As SGLang's; a match that splits a node ends at the new one, which is remembered."""
        result = super().match_prefix(params)
        self._remember(result.last_device_node, Namespace(params.key.extra_key, params.key.cache_salt))
        return result

    def touch_prefix(self, key: RadixKey) -> None:
        """As SGLang's: it may split a node as well."""
        self.match_prefix(MatchPrefixParams(key=key))

    def reset(self) -> None:
        """As SGLang's."""
        self._forget_nodes()
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
            Refused: a node below is not known.
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
        nodes = _complete(found)
        assert own <= found.keys(), "the path's nodes are known"
        return Subtree(nodes, found.keys() == own)

    def namespaces_of(self, extra_key: str) -> list[Namespace]:
        """Return where something of a thread is cached."""
        return [namespace for namespace in self._nodes if namespace.extra_key == extra_key]

    def nodes_of(self, namespace: Namespace) -> tuple[TreePathNodeInfo, ...]:
        """Return all nodes of a namespace, deepest first.

        Raises:
            Refused: one is not known.
        """
        paths = self._paths(namespace)
        return _complete({node.node_id: node for path in paths for node in path if node.path_end > node.path_start})

    def is_locked(self, nodes: Sequence[TreePathNodeInfo]) -> bool:
        """Whether a running request holds one of the nodes."""
        if not nodes:
            return False
        unlocked = self.tree_core.walk_for_kv_canary(unlocked_only=True, swa_resident_only=False).slot_indices
        own = self.slots_of(nodes)
        return not bool(torch.isin(own, unlocked.to(own.dtype)).all())

    def slots_of(self, nodes: Sequence[TreePathNodeInfo]) -> torch.Tensor:
        """Return the slots of nodes, without those of the nodes above them. Shape: (num_slots,), int64."""
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return torch.cat([none, *(self.path_device_indices(node.node_id)[node.path_start :] for node in nodes)])

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

    def detach(self, nodes: Sequence[TreePathNodeInfo]) -> None:
        """Take unlocked nodes out of the tree, deepest first; their slots are now the caller's."""
        for node in nodes:
            self._forget(node.node_id)
            result = self.tree_core.evict_device_leaf(node.node_id, self.is_write_back)
            assert result.backup_kv is None, "caches with a host tier are refused"
            result.device_frees.pop(ComponentType.FULL, None)  # else the pool would have them back
            self._apply_eviction_result(result)

    def attach(self, ids: Sequence[int], slots: torch.Tensor, known: int, namespace: Namespace) -> None:
        """Put a path into the tree whose first `known` entries are cached; duplicates of later ones are freed."""
        self.insert(InsertParams(key=_key(ids, namespace), value=slots.to(torch.int64), prev_prefix_len=known))

    def _evict_device_leaf(self, node_id: NodeId, tracker: dict[ComponentType, int]) -> Any:
        self._forget(node_id)
        return super()._evict_device_leaf(node_id, tracker)

    def _remember(self, end: NodeId, namespace: Namespace) -> None:
        """Remember a node and those above it. Where it is known, so are they: a split always ends at a new node."""
        if end in self._home:
            return
        for node in self.tree_core.collect_path_info([end])[0]:
            self._home[node.node_id] = namespace
            self._nodes.setdefault(namespace, {})[node.node_id] = None

    def _forget(self, node_id: NodeId) -> None:
        if (namespace := self._home.pop(node_id, None)) is not None:
            nodes = self._nodes[namespace]
            del nodes[node_id]
            if not nodes:
                del self._nodes[namespace]

    def _forget_nodes(self) -> None:
        self._home: dict[NodeId, Namespace] = {}
        self._nodes: dict[Namespace, dict[NodeId, None]] = {}

    def _paths(self, namespace: Namespace) -> tuple[tuple[TreePathNodeInfo, ...], ...]:
        """Return the path to every node of a namespace."""
        return self.tree_core.collect_path_info(list(self._nodes.get(namespace, ())))


def _key(ids: Sequence[int], namespace: Namespace) -> RadixKey:
    return RadixKey(array("q", ids), namespace.extra_key, cache_salt=namespace.cache_salt)


def _complete(found: Mapping[NodeId, TreePathNodeInfo]) -> tuple[TreePathNodeInfo, ...]:
    """Return nodes deepest first; raises Refused where a child of one is not among them."""
    children = Counter(node.parent_id for node in found.values())
    if any(node.num_children != children[node.node_id] for node in found.values()):
        raise Refused("unsupported", "the tree holds nodes that are not known; flush the cache")
    return tuple(sorted(found.values(), key=lambda node: -node.path_start))
