"""Contract of landmarks: what stands in L1 for blocks of a window's tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch

from ..cache.refill import Pooling


class Landmarks(ABC):
    """Makes the keys and values that stand for the blocks of a window, at any ratio.

    A window's tokens run through the model once, each block's landmark, where it is a token of its own, with them: it
    reads what its block's last token reads, that token, and the landmarks up to its own. Ordinary tokens do not read
    the landmarks of their own window, so within a window the model is the plain one.
    """

    attended: bool
    """Whether later windows, and what is decoded, attend to landmarks; else these only say what to refill."""
    are_tokens: ClassVar[bool]
    """Whether they run through the model as tokens of their own."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Names what made them: states of different landmarks must not meet in one cache."""

    @property
    @abstractmethod
    def pooling(self) -> Pooling:
        """How what is looked for in them becomes a score, unless something else is asked for."""

    def attached(self, model: Any, gate: torch.Tensor) -> AbstractContextManager[None]:
        """Let a model treat some of the tokens that it runs as landmarks; whatever happens, it is the old one after.

        Args:
            model: whose forward passes are changed by hooks; its weights are not touched.
            gate: which tokens are landmarks. Shape: (batch, num_tokens), bool
        """
        return nullcontext()

    @abstractmethod
    def states(self, k: torch.Tensor, v: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the landmarks of a window.

        Args:
            k: keys without rotation, of the window's tokens, then of its landmarks where they are tokens.
                Shape: (num_layers, num_tokens, num_kv_heads, head_dim)
            v: values, shape as `k`.
            sizes: tokens of each block, at least 1, in order. Shape: (num_blocks,)

        Returns:
            Keys without rotation, and values. Shape of each: (num_layers, num_blocks, num_kv_heads, head_dim)
        """
