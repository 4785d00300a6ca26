"""Storage of the KV cache: tensors and page reference counts, nothing about what they mean."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import CacheIntegrityError, PoolExhaustedError
from ..kernels import PagedKV, kernels_for
from .base import IntArray


class PagedKVPool:
    """K and V of `num_pages * page_size` tokens, handed out by the page.

    A page is shared by counting references; it is free when nobody holds it. The pool never moves data by itself.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model's cache.
        num_pages: capacity.
        page_size: tokens per page.
        dtype, device: of the tensors.
        storage: K and V where they lie elsewhere, as in a mapped file: of the shape below, zero where nothing is held.

    Attributes:
        k, v: Shape (num_layers, num_pages * page_size, num_kv_heads, head_dim)
        paged: the same by layer, for kernels.
        kernels: of the device.
        refcounts: how often each page is held. Shape: (num_pages,)
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        if min(num_layers, num_kv_heads, head_dim, num_pages, page_size) < 1:
            raise ValueError(
                f"every size of a pool must be at least 1, got {num_layers} layers, {num_kv_heads} KV heads of "
                f"{head_dim}, {num_pages} pages of {page_size}"
            )
        shape = (num_layers, num_pages * page_size, num_kv_heads, head_dim)
        if storage and any(tuple(x.shape) != shape or x.dtype != dtype for x in storage):
            raise ValueError(
                f"expected storage of shape {shape} in {dtype}, got {', '.join(f'{tuple(x.shape)}' for x in storage)} "
                f"in {storage[0].dtype}"
            )
        self.k, self.v = storage or tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.paged, self.kernels = PagedKV.of(self.k, self.v, page_size), kernels_for(self.k.device)
        self.page_size, self.num_pages = page_size, num_pages
        self.refcounts = np.zeros(num_pages, dtype=np.int64)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int64)  # a stack; its top is at num_free - 1
        self.num_free = num_pages

    def alloc(self, num_pages: int) -> IntArray:
        """Take pages, each held once. Contents are whatever was there.

        Raises:
            PoolExhaustedError: not enough free pages; nothing is taken.
        """
        if num_pages > self.num_free:
            raise PoolExhaustedError(
                f"the KV pool needs {num_pages} pages of {self.page_size} tokens but {self.num_free} of "
                f"{self.num_pages} are free; give the engine a larger max_tokens, shorten the thread, or finish other "
                "streams"
            )
        pages = self._free[self.num_free - num_pages : self.num_free].copy()
        self.num_free -= num_pages
        self.refcounts[pages] = 1
        return pages

    def claim(self, pages: IntArray, counts: IntArray) -> None:
        """Take given pages, each held as often as `counts` says; contents are whatever was there.

        For a cache that was saved. Shape of both: (num_pages,)

        Raises:
            CacheIntegrityError: a page is not free, or named twice, or would be held by nobody; nothing is taken.
        """
        self._check_pages(pages)
        if np.any(self.refcounts[pages] > 0):
            raise CacheIntegrityError(f"cannot claim pages in use {pages[self.refcounts[pages] > 0].tolist()[:8]}")
        if len(np.unique(pages)) < len(pages) or np.any(counts < 1):
            raise CacheIntegrityError("pages are claimed once each, to be held at least once")
        free = self._free[: self.num_free]
        left = free[~np.isin(free, pages)]
        self.num_free = len(left)
        self._free[: self.num_free] = left
        self.refcounts[pages] = counts

    def retain(self, pages: IntArray) -> None:
        """Hold pages once more. Raises CacheIntegrityError where one is free."""
        self._check_pages(pages)
        if np.any(self.refcounts[pages] < 1):
            raise CacheIntegrityError(f"cannot share free pages {pages[self.refcounts[pages] < 1].tolist()[:8]}")
        np.add.at(self.refcounts, pages, 1)

    def release(self, pages: IntArray) -> IntArray:
        """Hold pages once less; return those that became free. Raises CacheIntegrityError where one is free already."""
        self._check_pages(pages)
        unique, times = np.unique(pages, return_counts=True)
        if np.any(self.refcounts[unique] < times):
            raise CacheIntegrityError(f"pages freed twice: {unique[self.refcounts[unique] < times].tolist()[:8]}")
        self.refcounts[unique] -= times
        freed: IntArray = unique[self.refcounts[unique] == 0]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)
        return freed

    def read(self, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V. Shape of each: (num_layers, len(slots), num_kv_heads, head_dim)."""
        return self.kernels.gather_pages(self.paged, self.index(slots))

    def read_layer(self, layer: int, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V of one layer. Shape of each: (len(slots), num_kv_heads, head_dim)."""
        where = self.index(slots)
        return self.k[layer].index_select(0, where), self.v[layer].index_select(0, where)

    def write(self, slots: IntArray, k: torch.Tensor, v: torch.Tensor) -> None:
        """Overwrite K and V. Shapes as in `read`."""
        self.kernels.steer_scatter(self.paged, self.index(slots), k, v)

    def copy_pages(self, source: IntArray, target: IntArray) -> None:
        """Copy whole pages."""
        self.kernels.copy_pages(self.paged, self.index(source), self.index(target))

    def wipe(self, slots: IntArray) -> None:
        """Zero K and V of slots."""
        self.kernels.wipe(self.paged, self.index(slots))

    def index(self, slots: IntArray) -> torch.Tensor:
        """Return slots or pages as kernels take them."""
        return torch.from_numpy(np.ascontiguousarray(slots)).to(self.k.device)

    def slots_of(self, pages: IntArray) -> IntArray:
        """Return all slots of pages, in order."""
        slots: IntArray = (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)
        return slots

    def check_integrity(self) -> None:
        """Raise CacheIntegrityError unless the free pages are just those that nobody holds."""
        free = np.sort(self._free[: self.num_free])
        if not np.array_equal(free, np.flatnonzero(self.refcounts == 0)):
            raise CacheIntegrityError("the free list is not the set of pages without a holder")

    def _check_pages(self, pages: IntArray) -> None:
        # A negative number would silently name a page counted from the end.
        if len(pages) and not (pages.min() >= 0 and pages.max() < self.num_pages):
            raise CacheIntegrityError(f"pages must be in [0, {self.num_pages}), got {pages.min()} to {pages.max()}")
