"""Landmarks: compact states that stand for blocks of a window's tokens (ACRE, arXiv 2412.12486). Start with `base`."""

from .base import Landmarks
from .config import SHIPPED, LandmarkConfig
from .finding import find_landmarks
from .net import LandmarkNet
from .pooled import PooledLandmarks

__all__ = ["SHIPPED", "LandmarkConfig", "LandmarkNet", "Landmarks", "PooledLandmarks", "find_landmarks"]
