"""Plain transformers without any cache: the exact slow twin that engines are compared with (DESIGN D11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..cache.base import IntArray
from ..types import Interval


@torch.inference_mode()
def plain_logits(
    model: Any,
    ids: IntArray,
    *,
    positions: IntArray | None = None,
    num_last: int = 1,
    hidden: Sequence[Interval] = (),
    hidden_from: int = 0,
) -> torch.Tensor:
    """Return next-token logits of the last `num_last` tokens of one full forward pass.

    Args:
        model: a causal LM of transformers.
        ids: Shape: (num_tokens,)
        positions: rotary position of each token; None: 0, 1, 2, ... Shape: (num_tokens,)
        num_last: how many rows.
        hidden: intervals of tokens that the tokens from `hidden_from` on do not attend to.
        hidden_from: first such token.

    Returns:
        Shape: (num_last, vocab_size), float32, on the CPU.
    """
    n = len(ids)
    at = np.arange(n) if positions is None else positions
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    for start, end in hidden:
        seen[hidden_from:, start:end] = False
    # Without a mask of its own transformers would take a gap in the positions for the start of another sequence.
    mask = torch.zeros(n, n, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
    output = model(
        input_ids=_row(model, ids), position_ids=_row(model, at), attention_mask=mask[None, None].to(model.device),
        use_cache=False,
    )  # fmt: skip
    logits: torch.Tensor = output.logits[0, -num_last:].float().cpu()
    return logits


def plain_answer(model: Any, ids: IntArray, num_tokens: int) -> list[int]:
    """Return what greedy decoding adds to `ids`, one full forward pass per token, end tokens ignored."""
    answer: list[int] = []
    for _ in range(num_tokens):
        answer.append(int(plain_logits(model, np.append(ids, answer).astype(np.int64))[0].argmax()))
    return answer


@torch.inference_mode()
def plain_kv(model: Any, ids: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K (rotated) and V of every token.

    Returns:
        Shape of each: (num_layers, num_tokens, num_kv_heads, head_dim), on the CPU.
    """
    layers = model(input_ids=_row(model, ids), use_cache=True).past_key_values.layers
    return (
        torch.stack([layer.keys[0].transpose(0, 1) for layer in layers]).cpu(),
        torch.stack([layer.values[0].transpose(0, 1) for layer in layers]).cpu(),
    )


def _row(model: Any, values: IntArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))[None].to(model.device)
