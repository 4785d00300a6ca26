"""LangChain: a chat model on a session, and the middleware that carries its retractions in an agent's state."""

from .chat_model import ChatKVRetract
from .middleware import KVRetractApprovalMiddleware, KVRetractMiddleware

__all__ = ["ChatKVRetract", "KVRetractApprovalMiddleware", "KVRetractMiddleware"]
