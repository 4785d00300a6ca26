"""Radix tree over token ids, integers only: which slots hold which prefix (SGLang `mem_cache/radix_cache.py`)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

import numpy as np

from ..errors import CacheIntegrityError
from .base import NO_SLOT, IntArray, MatchResult, PrefixCache
from .evict_policy import evict_policy

_EMPTY: IntArray = np.empty(0, dtype=np.int64)
_ID_BYTES = _EMPTY.itemsize


class Node:
    """An edge of the tree and the node below it."""

    __slots__ = ("key", "slots", "parent", "children", "lock_ref", "last_access", "hits", "num_slots")

    def __init__(self, key: bytes, slots: IntArray, num_slots: int, parent: Node | None, now: int) -> None:
        self.parent, self.children = parent, dict[bytes, Node]()
        self.lock_ref, self.last_access, self.hits = 0, now, 0
        self.set(key, slots, num_slots)

    def set(self, key: bytes, slots: IntArray, num_slots: int) -> None:
        """Replace the entries; `key` is their ids, as bytes, and `num_slots` counts those with KV."""
        self.key, self.slots, self.num_slots = key, slots, num_slots

    @property
    def ids(self) -> IntArray:
        """Ids of the entries; not to be written to."""
        return np.frombuffer(self.key, dtype=np.int64)


_NOTHING = Node(b"", _EMPTY, 0, None, 0)  # the handle of a miss: like a root, it has nothing to lock


class RadixCache(PrefixCache):
    """Prefix index shared by all threads; see `PrefixCache`.

    Keys are compared as bytes: one memcmp per node, where an array costs more to slice than to read. Children are
    found by their first page. Time is a counter, not the clock.

    Args:
        page_size: lengths are multiples of it.
        eviction: `lru` or `lfu`.
    """

    def __init__(self, page_size: int = 1, eviction: str = "lru") -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        self.page_size, self._page_bytes = page_size, page_size * _ID_BYTES
        self._policy = evict_policy(eviction)
        self._clock = 0
        self._roots: dict[str, Node] = {}
        self._evictable = self._protected = 0

    @property
    def evictable_size(self) -> int:
        """Slots not under a lock."""
        return self._evictable

    @property
    def protected_size(self) -> int:
        """Slots under a lock."""
        return self._protected

    def match_prefix(self, ids: IntArray, *, extra_key: str = "") -> MatchResult:
        """Find the longest indexed prefix."""
        path, _ = self._walk(_key(ids), extra_key, split=True)
        self._touch(path)
        slots = np.concatenate([node.slots for node in path]) if path else _EMPTY.copy()
        return MatchResult(slots, path[-1] if path else self._roots.get(extra_key, _NOTHING))

    def insert(self, ids: IntArray, slots: IntArray, *, extra_key: str = "") -> int:
        """Index a path."""
        if len(ids) != len(slots):
            raise ValueError(f"a path needs one slot per id, got {len(ids)} ids and {len(slots)} slots")
        end = len(ids) // self.page_size * self.page_size
        key = _key(ids[:end])
        path, known = self._walk(key, extra_key, split=True)
        self._touch(path)
        if known < end:
            parent = path[-1] if path else self._root(extra_key)
            new = slots[known:end].copy()
            node = Node(key[known * _ID_BYTES :], new, _num_slots(new), parent, self._clock)
            parent.children[self._first_page(node.key)] = node
            self._evictable += node.num_slots
        return known

    def evict(self, num_slots: int) -> IntArray:
        """Drop leaves in the order of the policy."""
        order = count()  # ties are broken by age in the heap; nodes do not compare
        heap = [(self._policy.priority(n), next(order), n) for n in self._nodes() if not n.children and not n.lock_ref]
        heapq.heapify(heap)
        given, taken = [], 0
        while heap and taken < num_slots:
            _, _, node = heapq.heappop(heap)
            given.append(self._unlink(node))
            taken += node.num_slots
            parent = node.parent
            assert parent is not None, "a root is never in the heap"
            if parent.parent is not None and not parent.children and not parent.lock_ref:
                heapq.heappush(heap, (self._policy.priority(parent), next(order), parent))
        self._roots = {key: root for key, root in self._roots.items() if root.children}
        return np.concatenate(given) if given else _EMPTY.copy()

    def inc_lock_ref(self, node: Node) -> None:
        """Protect the path up to the root."""
        for n in self._upwards(node):
            if n.lock_ref == 0:
                self._evictable -= n.num_slots
                self._protected += n.num_slots
            n.lock_ref += 1

    def dec_lock_ref(self, node: Node) -> None:
        """Undo one `inc_lock_ref`."""
        path = list(self._upwards(node))
        if any(n.lock_ref < 1 for n in path):
            raise CacheIntegrityError("unlocked a path that is not locked")
        for n in path:
            n.lock_ref -= 1
            if n.lock_ref == 0:
                self._evictable += n.num_slots
                self._protected -= n.num_slots

    def exclusive_from(self, ids: IntArray, *, extra_key: str = "", locks: int = 0) -> int:
        """Find where the path stops being shared."""
        path, start = self._walk(_key(ids), extra_key, split=False)
        if start < sum(len(node.slots) for node in path):
            return start  # the rest of the last node is another branch
        below: Node | None = None
        for node in reversed(path):
            if node.lock_ref > locks or any(child is not below for child in node.children.values()):
                break
            start -= len(node.slots)
            below = node
        return start

    def remove_tail(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        """Remove what only this path uses, at or after `start`."""
        start = start // self.page_size * self.page_size
        key = _key(ids)
        self._walk(key[: start * _ID_BYTES], extra_key, split=True)
        path, end = self._walk(key, extra_key, split=True)
        given = []
        for node in reversed(path):
            end -= len(node.slots)
            if end < start or node.children or node.lock_ref:
                break
            given.append(self._unlink(node))
        return np.concatenate(given[::-1]) if given else _EMPTY.copy()

    def remove_branches(self, ids: IntArray, start: int, *, extra_key: str = "") -> IntArray:
        """Remove the subtree that the path enters at `start`."""
        start = start // self.page_size * self.page_size
        key, at = _key(ids), start * _ID_BYTES
        above, end = self._walk(key[:at], extra_key, split=True)
        root = above[-1] if above else self._roots.get(extra_key)
        if root is None or end < start:
            return _EMPTY.copy()
        node = root.children.get(self._first_page(key, at))
        subtree = [] if node is None else [node]
        for found in subtree:  # grows: parents stand before their children
            subtree.extend(found.children.values())
        given = [self._unlink(found) for found in reversed(subtree) if not found.children and not found.lock_ref]
        return np.concatenate(given) if given else _EMPTY.copy()

    def held_slots(self) -> IntArray:
        """All slots, one row per reference to a page."""
        slots = [node.slots for node in self._nodes()]
        return np.concatenate(slots) if slots else _EMPTY.copy()

    def paths(self) -> Iterator[tuple[str, IntArray, IntArray]]:
        """Walk up from every leaf."""
        names = {id(root): extra_key for extra_key, root in self._roots.items()}
        for leaf in sorted((n for n in self._nodes() if not n.children), key=lambda n: n.last_access):
            path = list(self._upwards(leaf))[::-1]
            ids, slots = (np.concatenate(part) for part in zip(*((n.ids, n.slots) for n in path), strict=True))
            yield names[id(path[0].parent)], ids, slots

    def check_integrity(self) -> None:
        """Check links, alignment, locks, sizes, and that no path uses a slot twice."""
        sizes = [0, 0]
        for node in self._nodes():
            self._check_node(node)
            sizes[node.lock_ref > 0] += node.num_slots
        if sizes != [self._evictable, self._protected]:
            raise CacheIntegrityError(
                f"sizes are {self._evictable} evictable and {self._protected} protected, the nodes hold {sizes}"
            )
        for leaf in self._nodes():
            if not leaf.children:
                slots = np.concatenate([node.slots for node in self._upwards(leaf)])
                slots = slots[slots != NO_SLOT]
                if len(np.unique(slots)) < len(slots):
                    raise CacheIntegrityError("a path uses one slot at two positions")

    def _check_node(self, node: Node) -> None:
        parent = node.parent
        if parent is None or parent.children.get(self._first_page(node.key)) is not node:
            raise CacheIntegrityError("a node is not linked from its parent under its first page")
        num_ids, num_slots = len(node.ids), len(node.slots)
        if num_ids == 0 or num_ids % self.page_size or num_ids != num_slots:
            raise CacheIntegrityError(f"a node of {num_ids} ids and {num_slots} slots is not page-aligned")
        if parent.parent is not None and node.lock_ref > parent.lock_ref:
            raise CacheIntegrityError("a node is locked more often than its parent")
        if node.num_slots != _num_slots(node.slots):
            raise CacheIntegrityError("a node miscounts its slots")

    def _root(self, extra_key: str) -> Node:
        if extra_key not in self._roots:
            self._roots[extra_key] = Node(b"", _EMPTY, 0, None, 0)
        return self._roots[extra_key]

    def _first_page(self, key: bytes, at: int = 0) -> bytes:
        """Return the name of a child whose key begins at a byte; that of no child where less than a page follows."""
        return key[at : at + self._page_bytes]

    def _walk(self, key: bytes, extra_key: str, *, split: bool) -> tuple[list[Node], int]:
        """Return the nodes of the longest indexed prefix and its length.

        With `split` the last node ends where the match ends.
        """
        node = self._roots.get(extra_key)
        path: list[Node] = []
        at, page = 0, self._page_bytes
        while node is not None and (node := node.children.get(key[at : at + page])) is not None:
            if not key.startswith(node.key, at):
                common = self._common(node, key, at)
                path.append(self._split(node, common) if split else node)
                return path, at // _ID_BYTES + common
            path.append(node)
            at += len(node.key)
        return path, at // _ID_BYTES

    def _common(self, node: Node, key: bytes, at: int) -> int:
        """Length of the common prefix of a node and what follows byte `at` of a key, page-aligned."""
        n = min(len(node.key), len(key) - at) // _ID_BYTES
        differs = np.frombuffer(node.key, np.int64, n) != np.frombuffer(key, np.int64, n, at)
        first = int(differs.argmax()) if differs.any() else n
        return first // self.page_size * self.page_size

    def _split(self, node: Node, length: int) -> Node:
        """Cut a node in two; return the upper part. Handles of the lower part stay valid."""
        parent = node.parent
        assert parent is not None, "a root has no entries to split"
        head, tail = node.slots[:length], node.slots[length:]
        in_head = _num_slots(head) if len(head) < len(tail) else node.num_slots - _num_slots(tail)
        cut = length * _ID_BYTES
        upper = Node(node.key[:cut], head, in_head, parent, node.last_access)
        upper.lock_ref, upper.hits = node.lock_ref, node.hits
        parent.children[self._first_page(upper.key)] = upper
        node.set(node.key[cut:], tail, node.num_slots - in_head)
        node.parent = upper
        upper.children[self._first_page(node.key)] = node
        return upper

    def _touch(self, path: list[Node]) -> None:
        self._clock += 1
        for node in path:
            node.last_access = self._clock
            node.hits += 1

    def _unlink(self, node: Node) -> IntArray:
        """Take an unlocked leaf out and return its slots."""
        assert node.parent is not None and not node.children and not node.lock_ref, "only free leaves are removed"
        del node.parent.children[self._first_page(node.key)]
        self._evictable -= node.num_slots
        return node.slots

    @staticmethod
    def _upwards(node: Node) -> Iterator[Node]:
        """A node and its ancestors, roots left out."""
        at: Node | None = node
        while at is not None and at.parent is not None:
            yield at
            at = at.parent

    def _nodes(self) -> Iterator[Node]:
        """All nodes but the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def _key(ids: IntArray) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()


def _num_slots(slots: IntArray) -> int:
    """Count the entries with KV."""
    return int(np.count_nonzero(slots != NO_SLOT))
