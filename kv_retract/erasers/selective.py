"""`selective`: recompute the suffix tokens that absorbed most."""

import math
from dataclasses import dataclass

from ..cache.base import EditView
from .base import EditCost, EditShape, Eraser, register_eraser
from .shift import close_gaps


@register_eraser("selective")
@dataclass(kw_only=True)
class SelectiveEraser(Eraser):
    """Delete-and-shift, then recompute the `ratio` of suffix tokens whose KV moved most.

    After CacheBlend (arXiv 2405.16444): tokens are ranked by how far their KV in an early layer is from what
    recomputation would write. Here one layer decides; CacheBlend narrows the choice layer by layer. With `ratio=0` it
    is `shift`, with `ratio=1` it equals `recompute`. Cost: the suffix through the layers below `layer`, `ratio` of it
    through all.
    """

    name = "selective"
    closes_gap = True

    ratio: float = 0.15
    """Share of the suffix to recompute, 0 to 1."""
    layer: int = 1
    """Layer that ranks the tokens; layer 0 sees no context, so 1 is the first that can tell."""

    def __post_init__(self) -> None:
        """Refuse a ratio outside of 0 to 1, and a negative layer."""
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"selective: ratio must be in [0, 1], got {self.ratio}")
        if self.layer < 0:
            raise ValueError(f"selective: layer must not be negative, got {self.layer}")

    def cost(self, shape: EditShape) -> EditCost:
        """The chosen tokens; ranking costs `layer` layers of the suffix on top."""
        return EditCost(recomputed=math.ceil(self.ratio * shape.suffix), moved=shape.suffix)

    def erase(self, view: EditView) -> None:
        """Close the gaps, rank, recompute the highest."""
        close_gaps(view)
        suffix = view.suffix
        count = math.ceil(self.ratio * len(suffix))
        if 0 < count < len(suffix):
            moved_most = view.deviation(suffix, self.layer).topk(count).indices
            suffix = suffix[moved_most.sort().values.numpy()]
        view.recompute(suffix[:count])
