"""`recompute`: the exact reference."""

from dataclasses import dataclass

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser


@register_eraser("recompute")
@dataclass(kw_only=True)
class RecomputeEraser(Eraser):
    """Full recomputation: prefills everything after the span without it.

    The only exact eraser: its cache equals a fresh prefill, and the span leaves the key. Cost: one forward pass over
    the suffix, so it grows with what came after, not with what is removed.
    """

    name = "recompute"
    closes_gap = True
    exact = True

    def cost(self, shape: EditShape) -> EditCost:
        """The whole suffix."""
        return EditCost(recomputed=shape.suffix)

    def erase(self, view: EditView) -> None:
        """Have the engine rebuild the path."""
        view.rebuild()
