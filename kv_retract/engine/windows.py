"""One pass of the model over a window of a long thread: L2 of its tokens and L1 of its landmarks.

With gradients where they are asked for, so training and the engine encode windows by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from ..cache.base import IntArray
from ..kernels.rope import Rotary, rotate_keys
from ..landmarks import Landmarks
from .working import additive_mask, cache_argument_of, logits_argument


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Keys and values. Shape of each: (num_layers, num_tokens, num_kv_heads, head_dim)."""

    k: torch.Tensor
    """Rotated for their positions, or without rotation; whoever makes it says which."""
    v: torch.Tensor

    def __len__(self) -> int:
        return self.k.shape[1]

    def placed(self, positions: IntArray, rotary: Rotary) -> States:
        """Return states without rotation rotated for some positions."""
        to = torch.from_numpy(np.ascontiguousarray(positions)).to(self.k.device)
        return States(rotate_keys(self.k, torch.zeros_like(to), to, rotary), self.v)

    def part(self, index: slice | torch.Tensor) -> States:
        """Return some of the tokens."""
        return States(self.k[:, index], self.v[:, index])


def joined(parts: Sequence[States]) -> States:
    """Return states behind each other."""
    return States(torch.cat([p.k for p in parts], dim=1), torch.cat([p.v for p in parts], dim=1))


@dataclass(frozen=True, slots=True, eq=False)
class EncodedWindow:
    """What a pass over a window gives."""

    tokens: States
    """L2, keys without rotation."""
    landmarks: States
    """L1, keys without rotation."""
    logits: torch.Tensor
    """Of the last ordinary tokens. Shape: (num_logits, vocab_size), float32"""


def encode_window(
    model: Any,
    rotary: Rotary,
    landmarks: Landmarks,
    past: States,
    ids: torch.Tensor,
    sizes: torch.Tensor,
    start: int,
    *,
    num_logits: int = 1,
) -> EncodedWindow:
    """Run a window's tokens through the model, and with them its landmarks.

    A token reads the past and the tokens before it; a landmark reads the past, all tokens up to its block's last one,
    and the landmarks before it, from the position of that token.

    Args:
        model: frozen; without gradient checkpointing, which would run it again without its landmarks.
        rotary: of the model.
        landmarks: what stands for blocks.
        past: what is attended to, keys rotated.
        ids: ordinary tokens. Shape: (num_tokens,)
        sizes: tokens of each block, at least 1, together `num_tokens`, in order. Shape: (num_blocks,)
        start: position of the first token.
        num_logits: return logits of so many last tokens, at least 1.

    Raises:
        ValueError: the sizes are not such.
    """
    num_tokens, before, device = len(ids), len(past), ids.device
    if int(sizes.sum()) != num_tokens or bool((sizes < 1).any()):
        raise ValueError(f"expected blocks of at least 1 and together {num_tokens} tokens, got {sizes.tolist()}")
    ends = sizes.cumsum(0).to(device)[: len(sizes) if landmarks.are_tokens else 0]
    extra = len(ends)
    last = torch.cat([torch.arange(num_tokens, device=device), ends - 1])  # each reads the tokens up to this one
    seen = torch.ones(len(last), before + len(last), dtype=torch.bool, device=device).tril(before)
    seen[:, before : before + num_tokens] = torch.arange(num_tokens, device=device) <= last[:, None]
    positions, gate = start + last, (torch.arange(len(last), device=device) >= num_tokens)[None]
    with landmarks.attached(model, gate):
        new, logits = run_behind(
            model, past, torch.cat([ids, ids.new_zeros(extra)]), positions, seen, num_logits=num_logits + extra
        )
    k, v = rotate_keys(new.k, positions, torch.zeros_like(positions), rotary), new.v
    return EncodedWindow(
        States(k[:, :num_tokens], v[:, :num_tokens]),
        States(*landmarks.states(k, v, sizes)),
        logits[:num_logits],
    )


def run_behind(
    model: Any, past: States, ids: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor, *, num_logits: int = 1
) -> tuple[States, torch.Tensor]:
    """Run tokens behind a past, each seeing what it is said to see.

    Args:
        model: frozen.
        past: keys rotated.
        ids: Shape: (num_tokens,)
        positions: Shape: (num_tokens,)
        seen: Shape: (num_tokens, len(past) + num_tokens), bool
        num_logits: return logits of so many last tokens, at least 1.

    Returns:
        States of the tokens, keys rotated; and logits, shape: (num_logits, vocab_size), float32.
    """
    before, cache = len(past), DynamicCache()
    for layer in range(past.k.shape[0] if before else 0):
        cache.update(past.k[layer].transpose(0, 1)[None], past.v[layer].transpose(0, 1)[None], layer)
    output = model(
        input_ids=ids[None], position_ids=positions[None],
        attention_mask=additive_mask(seen, model.dtype)[None, None],
        **{cache_argument_of(model): cache, "use_cache": True}, **logits_argument(model, num_logits),
    )  # fmt: skip
    layers: Any = cache.layers
    k, v = (
        torch.stack([getattr(layer, x)[0, :, before:].transpose(0, 1) for layer in layers]) for x in ("keys", "values")
    )
    return States(k, v), output.logits[0, -num_logits:].float()
