"""The kernels in plain torch: the exact twins of the fused ones, and what runs where there is no CUDA."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, rms_norm

from .base import HeadMap, Kernels, PagedKV
from .rope import Rotary, angles, rotate_keys, turn

_PART = 2048
"""Tokens that are rotated at once: what is made on the way then stays in the processor's cache."""


class TorchKernels(Kernels):
    """See `Kernels`; a few calls of torch per layer."""

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
        """Index-copy, layer by layer."""
        cos_sin = None
        if positions is not None:
            assert rotary is not None, "positions need a rotary"
            cos_sin = angles(torch.zeros_like(positions), positions, rotary, kv.device)
        for layer, (keys, values) in enumerate(zip(kv.k, kv.v, strict=True)):
            if cos_sin is None or rotary is None:
                keys.index_copy_(0, slots, k[layer].to(keys.dtype))
            else:
                for part in _parts(len(slots)):
                    turned = turn(k[layer, part].float(), cos_sin[0][part], cos_sin[1][part], rotary)
                    keys.index_copy_(0, slots[part], turned.to(keys.dtype))
            values.index_copy_(0, slots, v[layer].to(values.dtype))

    def gather_rotate(
        self, kv: PagedKV, slots: torch.Tensor, old: torch.Tensor, new: torch.Tensor, rotary: Rotary
    ) -> None:
        """Take out, rotate, put back."""
        cos, sin = angles(old, new, rotary, kv.device)
        for keys in kv.k:
            for part in _parts(len(slots)):
                some = slots[part]
                keys.index_copy_(0, some, turn(keys.index_select(0, some), cos[part], sin[part], rotary))

    def kv_map(
        self,
        kv: PagedKV,
        source: torch.Tensor,
        target: torch.Tensor,
        positions: torch.Tensor,
        weights: HeadMap,
        rotary: Rotary,
    ) -> None:
        """Take out, map, put back."""
        states = self.gather_pages(kv, source)
        self.steer_scatter(kv, target, *map_rotated(*states, positions, weights, rotary))

    def copy_pages(self, kv: PagedKV, source: torch.Tensor, target: torch.Tensor) -> None:
        """Index-copy, layer by layer."""
        source, target = kv.slots_of(source), kv.slots_of(target)
        for layer in (*kv.k, *kv.v):
            layer.index_copy_(0, target, layer.index_select(0, source))

    def gather_pages(
        self, kv: PagedKV, slots: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Index-select, layer by layer."""
        out = out or kv.empty(len(slots))
        hidden = slots < 0
        where, some_hidden = slots.clamp_min(0), bool(hidden.any())
        for layers, contiguous in zip((kv.k, kv.v), out, strict=True):
            for layer, rows in zip(layers, contiguous, strict=True):
                torch.index_select(layer, 0, where, out=rows)
                if some_hidden:
                    rows[hidden] = 0
        return out

    def wipe(self, kv: PagedKV, slots: torch.Tensor) -> None:
        """Fill with zeros, layer by layer."""
        for layer in (*kv.k, *kv.v):
            layer.index_fill_(0, slots, 0)


def _parts(count: int) -> list[slice]:
    return [slice(at, at + _PART) for at in range(0, count, _PART)]


def map_rotated(
    k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, weights: HeadMap, rotary: Rotary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map states whose keys are rotated for their positions; with gradients where they are asked for.

    Args:
        k: Shape: (num_layers, num_tokens, num_kv_heads, head_dim)
        v: shaped as `k`.
        positions: of the tokens. Shape: (num_tokens,)
        weights: of the map.
        rotary: of the model.

    Returns:
        Rotated keys, and values; shapes and dtype as given.
    """
    zero = torch.zeros_like(positions)
    bare, v = map_states(rotate_keys(k.float(), positions, zero, rotary), v, weights)
    return rotate_keys(bare, zero, positions, rotary).to(k.dtype), v


def map_states(k: torch.Tensor, v: torch.Tensor, weights: HeadMap) -> tuple[torch.Tensor, torch.Tensor]:
    """As `map_rotated`, on keys without rotation."""
    layers, tokens, heads, dim = k.shape
    x = torch.cat([rms_norm(k.float(), (dim,)), rms_norm(v.float(), (dim,))], dim=-1)
    x = x.transpose(1, 2).reshape(layers * heads, tokens, 2 * dim)
    change = gelu(x @ weights.w1 + weights.b1) @ weights.w2 + weights.b2
    change = change.reshape(layers, heads, tokens, 2 * dim).transpose(1, 2)
    dk, dv = change.split(dim, dim=-1)
    return (k + _rms(k) * dk).to(k.dtype), (v + _rms(v) * dv).to(v.dtype)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.float().square().mean(-1, keepdim=True).sqrt()
