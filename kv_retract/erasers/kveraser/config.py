"""Which learned eraser it is, and of which model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from ...errors import EraserMismatchError

Variant = Literal["blind", "suffix_aware", "kv_map"]
VARIANTS: Final = get_args(Variant)
CONFIG, WEIGHTS = "config.json", "eraser.safetensors"
"""Files of an eraser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEraserConfig:
    """Shape of a learned eraser and the model that it belongs to; JSON-able."""

    variant: Variant = "blind"
    """`blind`: the span is re-encoded reading the prefix and itself, as in the paper, so the result does not depend on
    what follows. `suffix_aware`: reading the whole cached thread. `kv_map`: no forward pass, a map on its cached KV."""
    rank: int = 16
    """Of the low-rank adapters (LoRA, arXiv 2106.09685); not for `kv_map`."""
    scale: float = 2.0
    """What the adapters' output is multiplied by: LoRA's alpha / rank."""
    hidden: int = 256
    """Width of the map's hidden layer; only for `kv_map`."""
    fingerprint: str = ""
    """Of the base model (`engine.support.fingerprint_of`); steering states mean nothing to another one."""
    base: str = ""
    """Name of the base model, for messages."""

    def __post_init__(self) -> None:
        """Refuse what is no variant or no size."""
        if self.variant not in VARIANTS:
            raise ValueError(f"expected a variant of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.rank < 1 or self.hidden < 1:
            raise ValueError(f"expected rank and hidden of at least 1, got {self.rank} and {self.hidden}")

    def check_base(self, fingerprint: str) -> None:
        """Raise EraserMismatchError where the eraser belongs to another model."""
        if fingerprint != self.fingerprint:
            raise EraserMismatchError(
                f"the eraser {self.variant!r} was trained on model {self.base!r} (fingerprint {self.fingerprint}), got "
                f"a model of fingerprint {fingerprint}; train one for it: kv-retract train eraser --model DIR"
            )

    def to_json(self) -> dict[str, Any]:
        """Return all fields; `from_json` inverts it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KVEraserConfig:
        """Build from `to_json`'s dictionary; raises ValueError where it is none."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not the configuration of a learned eraser: {error}") from error


def read_eraser_config(folder: Path) -> KVEraserConfig:
    """Read the configuration of the eraser in a folder.

    Raises:
        EraserMismatchError: there is none.
    """
    try:
        return KVEraserConfig.from_json(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise EraserMismatchError(
            f"expected a learned eraser in {str(folder)!r}: {error}; pass a folder that kv-retract train eraser wrote"
        ) from error
