"""Contract of the kernels: edits of a paged KV cache, each a single pass over the bytes that it touches.

Every operation exists twice with the same signature: `reference.TorchKernels` is exact, slow and runs everywhere;
`triton_kernels.TritonKernels` is its fused twin. Both compute in float32, whatever the dtype of the cache, and agree to
1e-5 in float32 and 1e-2 in bfloat16, relative to the largest value. Nothing outside of the named slots is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .rope import Rotary


@dataclass(frozen=True, eq=False)
class PagedKV:
    """Keys and values of all layers by slot, as a pool holds them; views, not copies.

    Args:
        k: keys of each layer. Shape of each: (num_slots, num_kv_heads, head_dim)
        v: values, shaped as the keys.
        page_size: slots of a page; page p is slots `p * page_size` and on.

    Raises:
        ValueError: layers differ in shape, dtype or device, or a slot's states are not contiguous.
    """

    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    page_size: int = 1

    def __post_init__(self) -> None:
        first = self.k[0]
        expected = (first.shape, first.dtype, first.device)
        if first.dim() != 3 or len(self.k) != len(self.v) or self.page_size < 1:
            raise ValueError(
                f"expected as many layers of keys as of values, of shape (num_slots, num_kv_heads, head_dim), and a "
                f"page size of at least 1; got {len(self.k)} and {len(self.v)}, {tuple(first.shape)}, {self.page_size}"
            )
        for layer in (*self.k, *self.v):
            if (layer.shape, layer.dtype, layer.device) != expected or not layer.is_contiguous():
                raise ValueError(
                    f"expected contiguous layers of shape {tuple(first.shape)} in {first.dtype} on {first.device}, got "
                    f"{tuple(layer.shape)} in {layer.dtype} on {layer.device} with strides {layer.stride()}"
                )

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, page_size: int = 1) -> PagedKV:
        """Return a view of K and V of all layers. Shape of each: (num_layers, num_slots, num_kv_heads, head_dim)."""
        return cls(k.unbind(0), v.unbind(0), page_size)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.k)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.k[0].device

    @cached_property
    def addresses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where keys and values of each layer begin: one launch reaches all. Shape of each: (num_layers,), int64.

        Raises:
            ValueError: a layer does not begin at a multiple of 16 bytes, as what torch allocates does.
        """
        if any(x.data_ptr() % 16 for x in (*self.k, *self.v)):
            raise ValueError(f"expected layers at multiples of 16 bytes; {tuple(self.k[0].shape)} slots are too narrow")
        k, v = (torch.tensor([x.data_ptr() for x in layers], device=self.device) for layers in (self.k, self.v))
        return k, v

    def slots_of(self, pages: torch.Tensor) -> torch.Tensor:
        """Return all slots of pages, in order."""
        if self.page_size == 1:
            return pages
        within = torch.arange(self.page_size, device=pages.device)
        return (pages[:, None] * self.page_size + within).reshape(-1)

    def empty(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return room for K and V. Shape of each: (num_layers, *shape, num_kv_heads, head_dim)."""
        size = (self.num_layers, *shape, *self.k[0].shape[1:])
        return self.k[0].new_empty(size), self.k[0].new_empty(size)


@dataclass(frozen=True, slots=True, eq=False)
class HeadMap:
    """Weights of a map on the KV of one token, for each layer and KV head; all float32.

    With `x = [k / rms(k), v / rms(v)]` and k without rotation, `[dk, dv] = gelu(x w1 + b1) w2 + b2`; the token then has
    `k + rms(k) dk` and `v + rms(v) dv`.
    """

    w1: torch.Tensor
    """Shape: (num_layers * num_kv_heads, 2 * head_dim, hidden)"""
    b1: torch.Tensor
    """Shape: (num_layers * num_kv_heads, 1, hidden)"""
    w2: torch.Tensor
    """Shape: (num_layers * num_kv_heads, hidden, 2 * head_dim)"""
    b2: torch.Tensor
    """Shape: (num_layers * num_kv_heads, 1, 2 * head_dim)"""


class Kernels(ABC):
    """Operations on a `PagedKV`; each ends on the stream on which it was called.

    Slots, pages and positions are int64 tensors on the cache's device. Slots that are written are all different, and
    none of them is read by the same call, but where an operation says that it works in place.
    """

    @abstractmethod
    def steer_scatter(
        self,
        kv: PagedKV,
        slots: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """Write states into slots, cast to the cache's dtype; keys are rotated for their positions on the way.

        Args:
            kv: written to.
            slots: Shape: (num_tokens,)
            k: keys without rotation, or, without `positions`, as they are to be cached; any floating dtype, strides
                between layers as they may be. Shape: (num_layers, num_tokens, num_kv_heads, head_dim)
            v: values, shaped as `k`.
            positions: of the tokens. Shape: (num_tokens,)
            rotary: of the model; needed with positions.
        """

    @abstractmethod
    def gather_rotate(
        self, kv: PagedKV, slots: torch.Tensor, old: torch.Tensor, new: torch.Tensor, rotary: Rotary
    ) -> None:
        """Rotate cached keys from positions to others, in place: delete-and-shift (RoFormer, arXiv 2104.09864, eq. 16).

        Args:
            kv: whose keys are changed; values stay.
            slots: Shape: (num_tokens,)
            old: positions that the keys are rotated for. Shape: (num_tokens,)
            new: positions to rotate them to. Shape: (num_tokens,)
            rotary: of the model.
        """

    @abstractmethod
    def kv_map(
        self,
        kv: PagedKV,
        source: torch.Tensor,
        target: torch.Tensor,
        positions: torch.Tensor,
        weights: HeadMap,
        rotary: Rotary,
    ) -> None:
        """Map the cached states of `source` and write them to `target`, which may be the same slots.

        Args:
            kv: read and written.
            source: Shape: (num_tokens,)
            target: Shape: (num_tokens,)
            positions: that the keys are rotated for, before and after. Shape: (num_tokens,)
            weights: on the cache's device.
            rotary: of the model.
        """

    @abstractmethod
    def copy_pages(self, kv: PagedKV, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy whole pages to other pages. Shape of both: (num_pages,)."""

    @abstractmethod
    def gather_pages(
        self, kv: PagedKV, slots: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy slots behind each other, as attention wants them.

        Args:
            kv: read.
            slots: -1 where there is nothing: zeros. Shape: (num_tokens,)
            out: written and returned; each layer contiguous. Shape of each: (num_layers, num_tokens, num_kv_heads,
                head_dim)

        Returns:
            K and V, shaped as `out`.
        """

    @abstractmethod
    def wipe(self, kv: PagedKV, slots: torch.Tensor) -> None:
        """Zero slots. Shape: (num_slots,)."""

    def gather_batch(
        self, kv: PagedKV, spans: Sequence[torch.Tensor] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy many spans side by side, the shorter ones with zeros behind them; one launch.

        Args:
            kv: read.
            spans: slots of each span, or all of them padded with -1. Shape: (num_spans, longest)

        Returns:
            K and V. Shape of each: (num_layers, num_spans, longest, num_kv_heads, head_dim)
        """
        if not isinstance(spans, torch.Tensor):
            spans = torch.nn.utils.rnn.pad_sequence(list(spans), batch_first=True, padding_value=-1)
        k, v = self.gather_pages(kv, spans.reshape(-1))
        return k.unflatten(1, spans.shape), v.unflatten(1, spans.shape)
