"""Hooks on a model that several Python threads may run."""

from __future__ import annotations

import threading
from typing import Any


def in_this_thread(hook: Any) -> Any:
    """Return a forward hook that acts in the Python thread that made it, and does nothing in others."""
    owner = threading.get_ident()
    return lambda *arguments: hook(*arguments) if threading.get_ident() == owner else None
