"""`mask`: the span's own KV is hidden."""

from dataclasses import dataclass

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser


@register_eraser("mask")
@dataclass(kw_only=True)
class MaskEraser(Eraser):
    """Hides the span from attention and gives its slots up; positions and all other KV stay.

    What later tokens absorbed while they read the span remains in their KV, and that is where most of a decision
    rides (arXiv 2606.17107). Cost: nothing but the tree operation.
    """

    name = "mask"

    def cost(self, shape: EditShape) -> EditCost:
        """Free."""
        return EditCost()

    def erase(self, view: EditView) -> None:
        """Hide every span."""
        for start, end in view.spans:
            view.hide(start, end)
