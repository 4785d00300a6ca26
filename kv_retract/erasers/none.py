"""`none`: the control arm."""

from dataclasses import dataclass

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser


@register_eraser("none")
@dataclass(kw_only=True)
class NoneEraser(Eraser):
    """Changes no KV: the span stays visible under tombstones.

    Shows what a stale cache does; never use it to retract. Cost: nothing.
    """

    name = "none"

    def cost(self, shape: EditShape) -> EditCost:
        """Free."""
        return EditCost()

    def erase(self, view: EditView) -> None:
        """Leave everything as it is."""
