"""`erratum`: tell the model instead of editing the cache."""

from dataclasses import dataclass

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser


@register_eraser("erratum")
@dataclass(kw_only=True)
class ErratumEraser(Eraser):
    """Changes no KV; the session appends a notice that says what was withdrawn.

    What an application without cache access does. The span stays visible. Cost: the tokens of the notice, in the
    next prefill.
    """

    name = "erratum"
    needs_notice = True

    def cost(self, shape: EditShape) -> EditCost:
        """Free; the notice belongs to the next step."""
        return EditCost()

    def erase(self, view: EditView) -> None:
        """Leave everything as it is."""
