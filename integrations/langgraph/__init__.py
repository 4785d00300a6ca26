"""LangGraph: a node for hand-written graphs, the purging of older checkpoints, and the session's thread for a run."""

from ..langchain.threads import current_thread, thread_of
from .checkpoints import apurge_checkpoints, purge_checkpoints
from .node import retract_step

__all__ = ["apurge_checkpoints", "current_thread", "purge_checkpoints", "retract_step", "thread_of"]
