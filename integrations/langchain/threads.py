"""The session's thread for a LangGraph run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langgraph.config import get_config


def thread_of(config: Mapping[str, Any]) -> str | None:
    """Return the session's thread for a run, by its config: the `thread_id`, or None where there is none.

    Graphs inside of other graphs (subgraphs, agents that a tool calls) run under the same `thread_id` with messages of
    their own, and share its retractions: those apply where the retracted message stands, and nowhere else.
    """
    thread_id = (config.get("configurable") or {}).get("thread_id")
    return None if thread_id is None else str(thread_id)


def current_thread() -> str | None:
    """Return the thread of the run that calls this; None outside of a run, or where it has no `thread_id`."""
    try:
        return thread_of(get_config())
    except RuntimeError:
        return None
