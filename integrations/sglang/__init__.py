"""Span retraction in a real SGLang server (0.5.23): a plugin for the server, an engine for the client.

`engine` is the client's half: `SGLangEngine`, which a session uses like the embedded engine. `api` is what the two
speak. `plugin` is the server's entry point, found by SGLang itself; nothing else of the server's half is imported by a
client. SGLang says "retract" where it preempts a request; here a *span retraction* is always named in full, or erase.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import SGLangEngine

__all__ = ["SGLangEngine"]


def __getattr__(name: str) -> Any:
    """Import the client on first use: the server's processes load this package without httpx."""
    if name == "SGLangEngine":
        from .engine import SGLangEngine

        return SGLangEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
