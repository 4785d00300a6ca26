"""Query-guided activation refilling: which L2 entries come back, and where everything stands (ACRE, section 3.3).

Pure functions on tensors and arrays; the engine runs the model between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ..kernels.rope import Rotary, rotate_keys
from .base import IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """How the newest tokens look at landmarks in one layer."""

    q: torch.Tensor
    """Their queries, rotated. Shape: (num_heads, num_queries, head_dim)"""
    landmark_k: torch.Tensor
    """Without rotation, as they are kept. Shape: (num_landmarks, num_kv_heads, head_dim)"""
    other_k: torch.Tensor
    """Of what else all of them see, rotated. Shape: (num_others, num_kv_heads, head_dim)"""
    scale: float
    """Of the model's attention."""
    start: int
    """Position of the first of them; the others follow it."""
    landmarks_at: IntArray
    """Positions of the landmarks. Shape: (num_landmarks,)"""
    rotary: Rotary

    def shares(self) -> torch.Tensor:
        """Return the attention paid to landmarks. Shape: (num_heads, num_queries, num_landmarks), float32."""
        at = torch.from_numpy(np.ascontiguousarray(self.landmarks_at))
        placed = rotate_keys(self.landmark_k, torch.zeros_like(at), at, self.rotary)
        return landmark_attention(self.q, placed, self.other_k, self.scale)

    def without_positions(self) -> torch.Tensor:
        """Return the queries as they were before their rotation; shape as `q`."""
        at = torch.arange(self.start, self.start + self.q.shape[1])
        return rotate_keys(self.q.transpose(0, 1), at, torch.zeros_like(at), self.rotary).transpose(0, 1)

    def matches(self, maps: torch.Tensor | None = None) -> torch.Tensor:
        """Return how much better each landmark matches a query than landmarks do on average, wherever they stand.

        Args:
            maps: of each head, applied to its queries. Shape: (num_heads, head_dim, head_dim)

        Returns:
            Shape: (num_heads, num_queries, num_landmarks), float32
        """
        sought, k = self.without_positions().float() * self.scale, self.landmark_k.float()
        if maps is not None:
            sought = torch.einsum("hqd,hde->hqe", sought, maps.float())
        own = (k - k.mean(0)).repeat_interleave(len(sought) // k.shape[1], dim=1)
        return torch.einsum("hqe,nhe->hqn", sought, own)


class Pooling(ABC):
    """Strategy: how what the newest tokens look for in a landmark, in all heads, becomes one score."""

    together: bool
    """Whether all layers bring back the same, by the sum of their scores; else each layer what it looks at itself."""

    @abstractmethod
    def scores(self, layer: int, look: Look) -> torch.Tensor:
        """Return the scores of landmarks in one layer: the higher, the sooner it is brought back.

        Shape: (num_landmarks,)
        """

    def all_scores(self, looks: Iterable[Look]) -> torch.Tensor:
        """Return the scores of landmarks in every layer. Shape: (num_layers, num_landmarks)."""
        scores = torch.stack([self.scores(layer, look) for layer, look in enumerate(looks)])
        return scores.sum(0, keepdim=True).expand_as(scores) if self.together else scores


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPooling(Pooling):
    """The maximum or the mean, over the newest tokens and then over heads: copying is the work of a few heads."""

    heads: Literal["max", "mean"] = "max"
    queries: Literal["max", "mean"] = "max"
    together: bool = False

    def __post_init__(self) -> None:
        """Check the names."""
        for name in ("heads", "queries"):
            if getattr(self, name) not in ("max", "mean"):
                raise ValueError(f"expected {name} pooled by max or mean, got {getattr(self, name)!r}")

    def scores(self, layer: int, look: Look) -> torch.Tensor:
        """Pool the shares of attention over one axis after the other."""
        attention = look.shares()
        pooled = attention.amax(1) if self.queries == "max" else attention.mean(1)
        return pooled.amax(0) if self.heads == "max" else pooled.mean(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchPooling(Pooling):
    """The head and the token that single a landmark out most, in standard deviations; all layers together.

    Needs no training. The first layer, whose keys know single tokens only, is left out.
    """

    together: bool = True

    def scores(self, layer: int, look: Look) -> torch.Tensor:
        """Measure matches by how they vary over landmarks."""
        found = look.matches()
        spread = found.std(-1, correction=0, keepdim=True)
        return (found / spread.clamp(min=1e-6)).amax((0, 1)) * (layer > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which rotary positions are for what, in order; none is beyond a number that does not grow with the thread.

    `[sinks | landmarks | refilled | local]`: local are the tokens that are cached in the ordinary way, and those of a
    window that is being encoded.
    """

    sinks: int
    """First tokens of the thread that are always attended to (StreamingLLM, arXiv 2309.17453)."""
    landmarks: int
    """Positions that all landmarks share: several stand at one where there are more."""
    refilled: int
    """Most tokens that are brought back."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.sinks, self.refilled) < 0 or self.landmarks < 1:
            raise ValueError(
                f"expected sinks and refilled of at least 0 and a position for landmarks, got {self.sinks}, "
                f"{self.refilled} and {self.landmarks}"
            )

    @property
    def local(self) -> int:
        """The first position of local tokens."""
        return self.sinks + self.landmarks + self.refilled

    def of_landmarks(self, count: int) -> IntArray:
        """Return positions of landmarks, in order. Shape: (count,)."""
        if count <= self.landmarks:
            return self.sinks + self.landmarks - count + np.arange(count)
        return self.sinks + np.arange(count) * self.landmarks // count

    def of_refilled(self, count: int) -> IntArray:
        """Return positions of refilled tokens, in order, next to the local ones. Shape: (count,)."""
        return self.local - count + np.arange(count)


def landmark_attention(q: torch.Tensor, landmark_k: torch.Tensor, other_k: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the share of attention that query tokens pay each landmark, beside what else they see.

    Args:
        q: rotated queries. Shape: (num_heads, num_queries, head_dim)
        landmark_k: rotated keys. Shape: (num_landmarks, num_kv_heads, head_dim)
        other_k: rotated keys of what else all of them see. Shape: (num_others, num_kv_heads, head_dim)
        scale: of the scores.

    Returns:
        Shape: (num_heads, num_queries, num_landmarks), float32
    """
    group = q.shape[0] // landmark_k.shape[1]
    keys = torch.cat([landmark_k, other_k]).float().repeat_interleave(group, dim=1)  # (rows, num_heads, head_dim)
    scores = torch.einsum("hqd,nhd->hqn", q.float() * scale, keys)
    return scores.softmax(-1)[..., : len(landmark_k)]


def choose(scores: torch.Tensor, sizes: IntArray, budget: int) -> IntArray:
    """Choose tokens to refill: the best blocks, whole, and of the last one what the budget leaves.

    Args:
        scores: of blocks, in each layer. Shape: (num_layers, num_blocks)
        sizes: tokens of each block. Shape: (num_blocks,)
        budget: most tokens.

    Returns:
        Indices of tokens, counted over all blocks, ascending; as many in every layer.
        Shape: (num_layers, min(budget, tokens in all))
    """
    ends = np.cumsum(sizes)
    count = int(min(budget, ends[-1])) if len(sizes) else 0
    offset = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)  # of each token in its block
    order = torch.argsort(scores, dim=-1, descending=True, stable=True).cpu().numpy()
    chosen = np.empty((len(order), count), dtype=np.int64)
    for layer, blocks in enumerate(order):
        lengths = np.empty_like(sizes)
        lengths[blocks] = np.clip(count - (np.cumsum(sizes[blocks]) - sizes[blocks]), 0, sizes[blocks])
        chosen[layer] = np.flatnonzero(offset < np.repeat(lengths, sizes))
    return chosen
