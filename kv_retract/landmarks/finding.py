"""Landmarks by name, for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LandmarkMismatchError
from .base import Landmarks
from .config import SHIPPED, read_landmark_config
from .net import LandmarkNet
from .pooled import PooledLandmarks


def find_landmarks(name: str, model: Any, fingerprint: str) -> Landmarks:
    """Return landmarks for a model.

    Args:
        name: `pooled`, a folder that `kv-retract train acre` wrote, or nothing: those that are bundled for the model,
            and pooled ones for a model without.
        model: whose landmarks they are.
        fingerprint: of its weights.

    Raises:
        LandmarkMismatchError: there are none in the folder, or they belong to another model.
        UnsupportedModelError: the model cannot have trained landmarks.
    """
    if name == "pooled":
        return PooledLandmarks()
    if name:
        return LandmarkNet.load(Path(name).expanduser(), model, fingerprint)
    try:
        read_landmark_config(SHIPPED).check_base(fingerprint)
    except LandmarkMismatchError:
        return PooledLandmarks()
    return LandmarkNet.load(SHIPPED, model, fingerprint)
