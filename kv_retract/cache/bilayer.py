"""Storage of threads beyond the window: a bi-layer KV cache (ACRE, arXiv 2412.12486, section 3).

A page of this pool is a *window* of a thread. Its ordinary tokens' keys and values are L2: detailed, on the host, in
memory or in a file. One *landmark* stands for each block of `ratio` tokens; the landmarks' keys and values are L1:
compact, on the device. Keys of both are kept without rotation, since where they are placed differs from one step to
the next. Index, leases and edits are those of the ordinary cache: a `CacheManager` joins this pool with a prefix
index whose page is as large as a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .base import NO_SLOT, IntArray
from .pool import PagedKVPool


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowShape:
    """How threads are cut."""

    window: int
    """Entries of a thread that are encoded together."""
    ratio: int
    """Tokens that one landmark stands for."""

    def __post_init__(self) -> None:
        if not 1 <= self.ratio <= self.window or self.window % self.ratio:
            raise ValueError(
                f"a window must be a multiple of the ratio, got a window of {self.window} tokens at ratio {self.ratio}"
            )

    @property
    def num_landmarks(self) -> int:
        """Of one window."""
        return self.window // self.ratio

    def blocks(self, slots: IntArray) -> NDArray[np.bool_]:
        """Return which blocks of some windows have a visible token; the landmarks of the others do not exist.

        Args:
            slots: of whole windows. Shape: (num_windows * window,)

        Returns:
            Shape: (num_windows * num_landmarks,)
        """
        seen: NDArray[np.bool_] = (slots.reshape(-1, self.ratio) != NO_SLOT).any(axis=1)
        return seen


class BiLayerPool(PagedKVPool):
    """L2 and L1 of `num_windows` windows.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model's cache.
        num_windows: capacity.
        shape: of a window.
        dtype: of both layers.
        device: of L1.
        storage: K and V of L2, as in `PagedKVPool`; by default in the memory of the host.

    Attributes:
        k, v: L2. Shape: (num_layers, num_windows * window, num_kv_heads, head_dim)
        landmark_k, landmark_v: L1. Shape: (num_layers, num_windows * num_landmarks, num_kv_heads, head_dim)
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_windows: int,
        shape: WindowShape,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(
            num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, num_pages=num_windows,
            page_size=shape.window, dtype=dtype, storage=storage,
        )  # fmt: skip
        self.shape = shape
        size = (num_layers, num_windows * shape.num_landmarks, num_kv_heads, head_dim)
        self.landmark_k = torch.zeros(size, dtype=dtype, device=device)
        self.landmark_v = torch.zeros(size, dtype=dtype, device=device)

    def landmark_rows(self, slots: IntArray) -> IntArray:
        """Return the rows of L1 of the landmarks that stand for some windows, in order.

        Args:
            slots: of whole windows. Shape: (num_windows * window,)

        Returns:
            One per block with a visible token. Shape: (num_blocks,)
        """
        highest = slots.reshape(-1, self.shape.ratio).max(axis=1)
        rows: IntArray = highest[highest != NO_SLOT] // self.shape.ratio
        return rows

    def read_landmarks(self, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V of landmarks. Shape of each: (num_layers, len(rows), num_kv_heads, head_dim)."""
        where = torch.from_numpy(rows).to(self.landmark_k.device)
        return self.landmark_k.index_select(1, where), self.landmark_v.index_select(1, where)

    def write_landmarks(self, rows: IntArray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite K and V of landmarks. Shapes as in `read_landmarks`."""
        where = torch.from_numpy(rows).to(self.landmark_k.device)
        self.landmark_k.index_copy_(1, where, k.to(self.landmark_k))
        self.landmark_v.index_copy_(1, where, v.to(self.landmark_v))

    def copy_pages(self, source: IntArray, target: IntArray) -> None:
        """Copy whole windows, both layers."""
        super().copy_pages(source, target)
        rows = [self.landmark_rows(self.slots_of(pages)) for pages in (source, target)]
        self.write_landmarks(rows[1], *self.read_landmarks(rows[0]))

    def wipe(self, slots: IntArray) -> None:
        """Zero K and V of slots, and of the landmarks all of whose tokens are among them."""
        super().wipe(slots)
        rows, counts = np.unique(slots // self.shape.ratio, return_counts=True)
        where = torch.from_numpy(rows[counts == self.shape.ratio]).to(self.landmark_k.device)
        self.landmark_k.index_fill_(1, where, 0)
        self.landmark_v.index_fill_(1, where, 0)
