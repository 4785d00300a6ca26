"""What readers of traces return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Another trace of the same thread: what came of a fork."""

    trace_id: str
    shared_messages: int
    """How many leading messages both traces have in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One recorded thread of an agent."""

    trace_id: str
    """Unique within what one call of `read_traces` returns, as long as the file's own ids are."""
    messages: tuple[Message, ...]
    source: str
    """`path:line`, or the path where a file holds one trace."""
    format: str
    """`openai`, `langgraph`, `swe_agent` or `react`."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI function tools, where the trace tells them."""
    branches: tuple[Branch, ...] = ()
    """The other branches of a forked thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceProblem:
    """A trace, or a line, that could not be read; the others are not affected."""

    source: str
    """As in `Trace.source`."""
    message: str
    """What was expected, what came, and what to do."""
