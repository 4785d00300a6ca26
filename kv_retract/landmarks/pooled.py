"""Landmarks without training: the mean of a block's keys and values."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..cache.refill import MatchPooling, Pooling
from .base import Landmarks


class PooledLandmarks(Landmarks):
    """Stand for a block by the means of its keys and of its values; work on any model.

    Only for choosing what to refill: a mean of values tells nothing, so windows do not read each other. As the block
    representatives of InfLLM (arXiv 2402.04617) and Quest (arXiv 2406.10774), in their simplest form.
    """

    attended = False
    are_tokens: ClassVar[bool] = False

    @property
    def identity(self) -> str:
        """One for all models."""
        return "pooled"

    @property
    def pooling(self) -> Pooling:
        """By what matches, wherever it stands: attention to means of keys finds next to nothing."""
        return MatchPooling()

    def states(self, k: torch.Tensor, v: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return means over blocks."""
        block = torch.repeat_interleave(torch.arange(len(sizes), device=k.device), sizes.to(k.device))
        count = sizes.to(k.device)[:, None, None]

        def means(x: torch.Tensor) -> torch.Tensor:
            sums = x.new_zeros((x.shape[0], len(sizes), *x.shape[2:]), dtype=torch.float32)
            return (sums.index_add_(1, block, x.float()) / count).to(x.dtype)

        return means(k), means(v)
