"""Detectors: they read messages and propose spans to take back. Importing this registers the built-in ones."""

from .base import POLICIES, PolicyContext, RetractionPolicy, register_policy
from .explicit import Explicit
from .superseded import SupersededToolResult
from .tool_error import ToolErrorRecovered

__all__ = [
    "POLICIES",
    "Explicit",
    "PolicyContext",
    "RetractionPolicy",
    "SupersededToolResult",
    "ToolErrorRecovered",
    "register_policy",
]
