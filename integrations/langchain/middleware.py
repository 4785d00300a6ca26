"""Middleware for `create_agent`: the retractions of a thread travel in the agent's private, checkpointed state.

One hook does it all, around the model call, and only there are the exact messages, the system prompt and the tools
known that the model will read. In order: records from the state are merged into the session; the call is told its
thread; the session retracts and answers; the records of the thread go into the state together with the answer.

So an answer and the retractions it was made under are one write of one graph step. An interrupt, a retry or a crash
before that write leaves the session's own ledger, and the repeated call finds its retractions made. The state is what
carries them elsewhere: to a new process, another replica, a copy of the checkpoint. A checkpoint from before a
retraction carries none: where an exact one must hold in its forks on another session too, give the session a ledger
file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
)
from langgraph.types import Command

from kv_retract.session import KVRetractSession

from .chat_model import ChatKVRetract, throw_away_thread
from .records import from_state, merge, to_state
from .threads import current_thread

Request = ModelRequest[Any]
Response = ModelResponse[Any] | ExtendedModelResponse[Any]


class RetractionState(AgentState[Any]):
    """What the middleware adds to an agent's state; hidden from input and output, not from streams of the state."""

    kv_retractions: NotRequired[Annotated[list[dict[str, Any]], PrivateStateAttr, merge]]
    """`RetractionRecord.to_json` of every retraction of the thread; no tensors, no retracted text."""


class KVRetractMiddleware(AgentMiddleware[RetractionState, Any, Any]):
    """Carries retractions in the agent's state and gives each model call its thread.

    Args:
        session: the one that the agent's `ChatKVRetract` answers through.
        name: as shown in traces and graphs; two middlewares of one agent need different ones.
    """

    state_schema = RetractionState
    tools = ()

    def __init__(self, session: KVRetractSession, *, name: str = "kv_retract") -> None:
        super().__init__()
        self.session = session
        self._name = name

    @property
    def name(self) -> str:
        """See the class."""
        return self._name

    def wrap_model_call(self, request: Request, handler: Callable[[Request], ModelResponse[Any]]) -> Response:
        """Merge records, answer, keep records.

        Raises:
            ValueError: the agent's model is no `ChatKVRetract` on this session.
        """
        thread_id = self._enter(request)
        response = handler(_for_thread(request, thread_id))
        return self._with_records(request, response, thread_id)

    async def awrap_model_call(
        self, request: Request, handler: Callable[[Request], Awaitable[ModelResponse[Any]]]
    ) -> Response:
        """As `wrap_model_call`."""
        thread_id = self._enter(request)
        response = await handler(_for_thread(request, thread_id))
        return self._with_records(request, response, thread_id)

    def _enter(self, request: Request) -> str:
        model = request.model
        if not isinstance(model, ChatKVRetract) or model.session is not self.session:
            raise ValueError(
                f"middleware {self.name!r} expected a ChatKVRetract on its own session as the agent's model, got "
                f"{type(model).__name__}{' on another session' if isinstance(model, ChatKVRetract) else ''}; pass "
                "create_agent(ChatKVRetract(session=session), middleware=[KVRetractMiddleware(session)])"
            )
        thread_id = request.model_settings.get("thread_id") or model.thread_id or current_thread()
        # Without a thread the state still lives as long as the run: it carries the records from call to call.
        thread_id = thread_id or throw_away_thread()
        self.session.restore(thread_id, from_state(_records(request)))
        return str(thread_id)

    def _with_records(self, request: Request, response: ModelResponse[Any], thread_id: str) -> Response:
        records = to_state(self.session.history(thread_id))
        if records == _records(request):
            return response
        return ExtendedModelResponse(model_response=response, command=Command(update={"kv_retractions": records}))


def _for_thread(request: Request, thread_id: str) -> Request:
    return request.override(model_settings={**request.model_settings, "thread_id": thread_id})


def _records(request: Request) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = request.state.get("kv_retractions") or []  # type: ignore[assignment]
    return records
