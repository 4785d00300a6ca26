"""Rotary embeddings of cached keys: move a key to another position without its token (RoFormer, arXiv 2104.09864).

R(p + d) k = R(d) R(p) k, so a cached key is rotated by the difference of two angles. The angles are formed as
transformers forms them, `float32(position) * float32(inv_freq)`, and subtracted in float64: at position 8,000 a
float32 angle is off by up to 5e-4, and only the same rounding reproduces the key that a fresh prefill would write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """How a model rotates its keys."""

    inv_freq: torch.Tensor
    """Inverse frequencies. Shape: (rotary_dim / 2,), float32"""
    interleaved: bool = False
    """False: dimension i pairs with i + rotary_dim / 2 (Llama); True: with its neighbour (GPT-J, Cohere)."""


def rotate_keys(k: torch.Tensor, old: torch.Tensor, new: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate keys that were cached at positions `old` to positions `new`.

    Args:
        k: rotated keys, any leading dimensions. Shape: (..., num_tokens, num_kv_heads, head_dim)
        old: positions they are rotated for. Shape: (num_tokens,)
        new: positions to rotate them to. Shape: (num_tokens,)
        rotary: frequencies and layout; dimensions past the rotary ones are left alone (partial rotary, Phi-3).

    Returns:
        New tensor of `k`'s shape and dtype; computed in float32.
    """
    return turn(k, *angles(old, new, rotary, k.device), rotary)


def angles(
    old: torch.Tensor, new: torch.Tensor, rotary: Rotary, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of the turns between positions. Shape of each: (num_tokens, rotary_dim / 2), float32."""
    inv_freq = rotary.inv_freq.to(device)
    angle = _angle(new, inv_freq) - _angle(old, inv_freq)  # float64
    return angle.cos().float(), angle.sin().float()


def turn(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate keys by angles that `angles` made, as `rotate_keys` does."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    x = k[..., : 2 * half].float()
    if rotary.interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x[..., :half], x[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(k.dtype), k[..., 2 * half :]), dim=-1)


def _angle(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    return (positions.to(inv_freq.device, torch.float32)[:, None] * inv_freq).double()
