"""Erasers: strategies that take a span's influence out of a cache. Importing this package registers its own."""

from .base import ERASERS, EditCost, EditShape, Eraser, register_eraser
from .erratum import ErratumEraser
from .in_place import InPlaceEraser
from .kveraser import KVEraserEraser
from .mask import MaskEraser
from .none import NoneEraser
from .recompute import RecomputeEraser
from .repair import RepairEraser
from .selective import SelectiveEraser
from .shift import ShiftEraser

__all__ = [
    "ERASERS",
    "EditCost",
    "EditShape",
    "Eraser",
    "ErratumEraser",
    "InPlaceEraser",
    "KVEraserEraser",
    "MaskEraser",
    "NoneEraser",
    "RecomputeEraser",
    "RepairEraser",
    "SelectiveEraser",
    "ShiftEraser",
    "register_eraser",
]
