"""LangGraph: a node for hand-written graphs, and the session's thread for a run."""

from ..langchain.threads import current_thread, thread_of
from .node import retract_step

__all__ = ["current_thread", "retract_step", "thread_of"]
