"""Which leaf of the radix tree goes first (SGLang `mem_cache/evict_policy.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from ..errors import UnknownNameError


class Evictable(Protocol):
    """What a policy may look at."""

    last_access: int
    """Logical time of the last use."""
    hits: int
    """How often it was matched."""


class EvictPolicy(ABC):
    """Orders leaves; the smallest priority is evicted first."""

    @abstractmethod
    def priority(self, node: Evictable) -> tuple[int, ...]:
        """Return the sort key of a leaf."""


class LRU(EvictPolicy):
    """Least recently used first."""

    def priority(self, node: Evictable) -> tuple[int, ...]:
        """Time of the last use."""
        return (node.last_access,)


class LFU(EvictPolicy):
    """Least frequently used first; among equals, least recently used."""

    def priority(self, node: Evictable) -> tuple[int, ...]:
        """Hits, then time."""
        return (node.hits, node.last_access)


_POLICIES: dict[str, type[EvictPolicy]] = {"lru": LRU, "lfu": LFU}


def evict_policy(name: str) -> EvictPolicy:
    """Return a policy by name; raises UnknownNameError."""
    if name not in _POLICIES:
        raise UnknownNameError(f"unknown eviction policy {name!r}; known: {', '.join(sorted(_POLICIES))}")
    return _POLICIES[name]()
