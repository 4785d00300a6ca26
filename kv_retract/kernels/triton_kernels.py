"""The kernels in Triton: one launch for all layers, keys and values together.

A layer is reached through the address of its first slot, so it does not matter whether a pool is one tensor (the
embedded engine) or one per layer (SGLang). Angles are formed as `rope` forms them: `float32(position) *
float32(inv_freq)`, subtracted and brought into one turn in float64, since at position 8,000 a float32 angle is off by
5e-4. Needs Triton; with TRITON_INTERPRET=1, set before this module is loaded, it runs on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .base import HeadMap, Kernels, PagedKV
from .programs import map_kernel, move_kernel, rotate_kernel
from .rope import Rotary

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TURN = 6.283185307179586
_EPSILON = 1.1920928955078125e-07  # of torch.nn.functional.rms_norm in float32
_TOKENS = 16
"""Tokens of one program of `_rotate` and `_map`."""


class TritonKernels(Kernels):
    """See `Kernels`."""

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
        """Rotate, cast and write in one pass."""
        given = _given(k, v)
        if positions is None:
            _move(given, kv, None, slots, len(slots))
        else:
            assert rotary is not None, "positions need a rotary"
            _rotate(given, kv, None, slots, None, positions, rotary, values=True)

    def gather_rotate(
        self, kv: PagedKV, slots: torch.Tensor, old: torch.Tensor, new: torch.Tensor, rotary: Rotary
    ) -> None:
        """Read and write each key once."""
        _rotate(kv, kv, slots, slots, old, new, rotary, values=False)

    def kv_map(
        self,
        kv: PagedKV,
        source: torch.Tensor,
        target: torch.Tensor,
        positions: torch.Tensor,
        weights: HeadMap,
        rotary: Rotary,
    ) -> None:
        """Read and write each state once, and the weights once per `_TOKENS` tokens; all layers and heads at once."""
        num_tokens, hidden = len(source), weights.w1.shape[-1]
        _, heads, dim = kv.k[0].shape
        if not num_tokens:
            return
        grid = (triton.cdiv(num_tokens, _TOKENS), heads, kv.num_layers)
        with _on(kv):
            map_kernel[grid](
                *kv.addresses, source, target, positions, _frequencies(rotary, kv),
                weights.w1.contiguous(), weights.b1.contiguous(), weights.w2.contiguous(), weights.b2.contiguous(),
                num_tokens, heads, DIM=dim, HALF=rotary.inv_freq.numel(), HIDDEN=hidden, TYPE=_TYPES[kv.k[0].dtype],
                INTERLEAVED=rotary.interleaved, TOKENS=_TOKENS, PAIRS=max(16, triton.next_power_of_2(dim // 2)),
                WIDTH=max(16, triton.next_power_of_2(dim)), CHUNK=16, TURN=_TURN, EPSILON=_EPSILON,
                num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip

    def copy_pages(self, kv: PagedKV, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slot by slot."""
        source, target = kv.slots_of(source), kv.slots_of(target)
        _move(kv, kv, source, target, len(target))

    def gather_pages(
        self, kv: PagedKV, slots: torch.Tensor, *, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy slot by slot."""
        out = out or kv.empty(len(slots))
        _move(kv, PagedKV.of(*out), slots, None, len(slots))
        return out

    def wipe(self, kv: PagedKV, slots: torch.Tensor) -> None:
        """Copy from nowhere."""
        _move(kv, kv, torch.full_like(slots, -1), slots, len(slots))


def _given(k: torch.Tensor, v: torch.Tensor) -> PagedKV:
    """Return states as a cache whose slots are their tokens."""
    if not (k[0].is_contiguous() and v[0].is_contiguous()):
        k, v = k.contiguous(), v.contiguous()
    return PagedKV.of(k, v)


def _on(kv: PagedKV) -> torch.cuda.device:
    """Launch on the cache's device; does nothing on the CPU, where the interpreter runs."""
    return torch.cuda.device(kv.device if kv.device.type == "cuda" else -1)


def _frequencies(rotary: Rotary, kv: PagedKV) -> torch.Tensor:
    return rotary.inv_freq.to(kv.device, torch.float32)


def _move(
    source: PagedKV, target: PagedKV, from_slots: torch.Tensor | None, to_slots: torch.Tensor | None, count: int
) -> None:
    """Copy slots, in order where none are named; -1 reads as zeros."""
    if not count:
        return
    row = source.k[0].shape[1] * source.k[0].shape[2]
    width = min(1024, triton.next_power_of_2(row))
    tokens = max(1, 4096 // width)
    unused = target.addresses[0]
    with _on(target):
        move_kernel[triton.cdiv(count, tokens), target.num_layers](
            *source.addresses, *target.addresses, unused if from_slots is None else from_slots,
            unused if to_slots is None else to_slots, count, ROW=row, FROM=_TYPES[source.k[0].dtype],
            TO=_TYPES[target.k[0].dtype], NAMED_FROM=from_slots is not None, NAMED_TO=to_slots is not None,
            TOKENS=tokens, WIDTH=width, enable_fp_fusion=True,
        )  # fmt: skip


def _rotate(
    source: PagedKV,
    target: PagedKV,
    from_slots: torch.Tensor | None,
    to_slots: torch.Tensor,
    old: torch.Tensor | None,
    new: torch.Tensor,
    rotary: Rotary,
    *,
    values: bool,
) -> None:
    """Rotate keys from one place to another, and copy values along where that is asked for."""
    if not len(new):
        return
    _, heads, dim = target.k[0].shape
    with _on(target):
        rotate_kernel[triton.cdiv(len(new), _TOKENS), target.num_layers](
            *source.addresses, *target.addresses, to_slots if from_slots is None else from_slots, to_slots,
            new if old is None else old, new, _frequencies(rotary, target), len(new), heads, DIM=dim,
            HALF=rotary.inv_freq.numel(), FROM=_TYPES[source.k[0].dtype], TO=_TYPES[target.k[0].dtype],
            INTERLEAVED=rotary.interleaved, NAMED_FROM=from_slots is not None, ROTATED=old is not None, VALUES=values,
            TOKENS=_TOKENS, PAIRS=triton.next_power_of_2(dim // 2), WIDTH=triton.next_power_of_2(dim), TURN=_TURN,
            enable_fp_fusion=True,
        )  # fmt: skip
