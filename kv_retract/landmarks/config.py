"""Which trained landmarks they are, and of which model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ..errors import LandmarkMismatchError

CONFIG, WEIGHTS = "config.json", "landmarks.safetensors"
"""Files of trained landmarks."""
SHIPPED: Final = Path(__file__).parents[1] / "reference" / "landmarks"
"""Those of the bundled model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LandmarkConfig:
    """The model that landmarks belong to; JSON-able."""

    fingerprint: str
    """Of the base model (`engine.working.fingerprint_of`); its states mean nothing to another one."""
    base: str = ""
    """Name of the base model, for messages."""
    attended: bool = True
    """Whether what comes later reads them (ACRE), or they only say what to bring back."""

    def check_base(self, fingerprint: str) -> None:
        """Raise LandmarkMismatchError where the landmarks belong to another model."""
        if fingerprint != self.fingerprint:
            raise LandmarkMismatchError(
                f"the landmarks were trained on model {self.base!r} (fingerprint {self.fingerprint}), got a model of "
                f"fingerprint {fingerprint}; train some for it: kv-retract train acre --model DIR"
            )

    def save(self, folder: Path) -> None:
        """Write `config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_landmark_config(folder: Path) -> LandmarkConfig:
    """Read the configuration of the landmarks in a folder.

    Raises:
        LandmarkMismatchError: there is none.
    """
    try:
        return LandmarkConfig(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise LandmarkMismatchError(
            f"expected trained landmarks in {str(folder)!r}: {error}; pass a folder that kv-retract train acre wrote"
        ) from error
