"""`kveraser`: learned steering states in the span's positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...cache.base import EditView
from ...errors import EraserMismatchError
from ..base import EditCost, EditShape, Eraser, register_eraser
from .config import VARIANTS, WEIGHTS, read_eraser_config

SHIPPED: Final = Path(__file__).parents[2] / "reference" / "erasers"
"""Erasers of the bundled model, a folder per variant."""


@register_eraser("kveraser")
@dataclass(kw_only=True)
class KVEraserEraser(Eraser):
    """Overwrites the span's own KV by steering states that cancel what later tokens absorbed of it.

    KVEraser (arXiv 2606.17034): nothing but the span's entries changes, and no position moves. Which states those are
    was learned for one model (`kv-retract train eraser`); an edit of another one raises EraserMismatchError. The span
    stays visible, under tombstones. Cost: the span's tokens through the model, or, for `kv_map`, a rewrite of their KV
    without it.

    Raises:
        EraserMismatchError: there is no eraser in the folder.
        ValueError: the variant is unknown.
    """

    name = "kveraser"

    variant: str = "kv_map"
    """Which eraser of the bundled model: `blind`, `suffix_aware` or `kv_map`; of no meaning with a path."""
    path: str = ""
    """Folder of an eraser for another model."""

    def __post_init__(self) -> None:
        """Read the configuration."""
        if self.variant not in VARIANTS:
            raise ValueError(f"kveraser: expected a variant of {', '.join(VARIANTS)}, got {self.variant!r}")
        self._folder = Path(self.path).expanduser() if self.path else SHIPPED / self.variant
        self.config = read_eraser_config(self._folder)
        self.variant = self.config.variant
        self._nets: dict[str, Any] = {}

    @cached_property
    def eraser_id(self) -> str:
        """Variant, and a digest of the weights: where the folder lies says nothing."""
        try:
            digest = sha256((self._folder / WEIGHTS).read_bytes()).hexdigest()[:12]
        except OSError as error:
            raise EraserMismatchError(f"cannot read the weights in {str(self._folder / WEIGHTS)!r}: {error}") from error
        return f"{self.name}(variant={self.variant!r},weights={digest!r})"

    @cached_property
    def num_parameters(self) -> int:
        """Of the weights; reads no more than their shapes."""
        from math import prod

        from safetensors import safe_open

        with safe_open(self._folder / WEIGHTS, "numpy") as weights:
            return sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118

    @property
    def suffix_free(self) -> bool:
        """True but for `suffix_aware`."""
        return self.variant != "suffix_aware"

    def cost(self, shape: EditShape) -> EditCost:
        """The span."""
        return EditCost(moved=shape.span) if self.variant == "kv_map" else EditCost(recomputed=shape.span)

    def erase(self, view: EditView) -> None:
        """Write steering states."""
        from .model import load_net

        self.config.check_base(view.fingerprint)
        net = self._nets.get(view.device)
        if net is None:
            net = self._nets.setdefault(view.device, load_net(self._folder, view.device))
        if self.variant == "kv_map":
            index = np.concatenate([np.arange(start, end) for start, end in view.spans])
            view.map_states(index, net.weights)
        else:
            view.reencode(net.attached, sees_suffix=self.variant == "suffix_aware")
