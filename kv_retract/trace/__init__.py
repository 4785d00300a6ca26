"""Recorded agent threads: OpenAI chat messages, LangGraph histories, SWE-agent trajectories, ReAct logs."""

from .base import Branch, Trace, TraceProblem
from .reader import read_traces

__all__ = ["Branch", "Trace", "TraceProblem", "read_traces"]
