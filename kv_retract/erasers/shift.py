"""`shift`: delete-and-shift."""

from dataclasses import dataclass

import numpy as np

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser


@register_eraser("shift")
@dataclass(kw_only=True)
class ShiftEraser(Eraser):
    """Hides the span and rotates the keys after it, so that the gap in positions closes.

    The delete-and-shift baseline of KVEraser (arXiv 2606.17034), known from context shifting in llama.cpp. Positions
    are then those of a fresh prefill; contents still hold what the suffix absorbed. Cost: one pass over the suffix
    keys, without the model.
    """

    name = "shift"
    closes_gap = True

    def cost(self, shape: EditShape) -> EditCost:
        """Touches every key of the suffix."""
        return EditCost(moved=shape.suffix)

    def erase(self, view: EditView) -> None:
        """Hide every span and close the gaps."""
        close_gaps(view)


def close_gaps(view: EditView) -> None:
    """Hide all spans of `view` and move what follows up by the length of the spans before it."""
    ends = np.array([end for _, end in view.spans])
    removed = np.cumsum([end - start for start, end in view.spans])
    followers = view.followers
    for start, end in view.spans:
        view.hide(start, end)
    view.move(followers, -removed[np.searchsorted(ends, followers, side="right") - 1])
