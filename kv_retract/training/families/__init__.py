"""Task families of the corpus; importing this package registers them.

A family is a function from a `Writer` to a `Draft`, registered under its name. Its docstring has a worked example.
"""

from . import documents, errors, facts, injections, needles, preferences, relations, updates
from .base import FAMILIES, HELD_OUT

__all__ = [
    "FAMILIES",
    "HELD_OUT",
    "documents",
    "errors",
    "facts",
    "injections",
    "needles",
    "preferences",
    "relations",
    "updates",
]
