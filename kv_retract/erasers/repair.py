"""`repair`: local suffix repair."""

from dataclasses import dataclass

import numpy as np

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser
from .shift import close_gaps


@register_eraser("repair")
@dataclass(kw_only=True)
class RepairEraser(Eraser):
    """Delete-and-shift, then recompute the first `tokens` tokens after each span.

    The local suffix repair baseline of KVEraser (arXiv 2606.17034). With `tokens=0` it is `shift`; with as many tokens
    as the suffix has it equals `recompute`. Cost: `tokens` through the model per span, and a pass over the suffix keys.
    """

    name = "repair"
    closes_gap = True

    tokens: int = 32
    """Tokens to recompute after each span."""

    def __post_init__(self) -> None:
        """Refuse a negative number of tokens."""
        if self.tokens < 0:
            raise ValueError(f"repair: tokens must not be negative, got {self.tokens}")

    def cost(self, shape: EditShape) -> EditCost:
        """The repaired tokens of one span, and a pass over the suffix keys."""
        return EditCost(recomputed=min(self.tokens, shape.suffix), moved=shape.suffix)

    def erase(self, view: EditView) -> None:
        """Close the gaps, then recompute the first tokens after each."""
        close_gaps(view)
        suffix = view.suffix
        ends = np.array([end for _, end in view.spans])
        after = np.searchsorted(ends, suffix, side="right") - 1  # which span each suffix token follows
        rank = np.arange(len(suffix)) - np.searchsorted(after, after, side="left")  # its place behind that span
        view.recompute(suffix[rank < self.tokens])
