"""`in_place`: recompute what follows, where it stands."""

from dataclasses import dataclass

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser


@register_eraser("in_place")
@dataclass(kw_only=True)
class InPlaceEraser(Eraser):
    """Hides the span and recomputes everything behind it at the positions it has.

    Nothing has read the span any more, and only the gap in positions tells it from `recompute`: what an eraser that
    keeps positions (`mask`, `kveraser`) could reach at best, on this model at this length. Cost: one forward pass over
    the suffix, as `recompute`.
    """

    name = "in_place"

    def cost(self, shape: EditShape) -> EditCost:
        """The whole suffix."""
        return EditCost(recomputed=shape.suffix)

    def erase(self, view: EditView) -> None:
        """Hide every span, then run the suffix again."""
        for start, end in view.spans:
            view.hide(start, end)
        view.recompute(view.suffix)
