"""Middleware for `create_agent`: the retractions of a thread travel in the agent's private, checkpointed state.

One hook does it, around the model call, and only there are the exact messages, the system prompt and the tools known
that the model will read. In order: records from the state are merged into the session; the call is told its thread; the
session retracts and answers; the records of the thread go into the state together with the answer. Where people are
asked first, they are asked in a node of its own before that.

So an answer and the retractions it was made under are one write of one graph step. An interrupt, a retry or a crash
before that write leaves the session's own ledger, and the repeated call finds its retractions made. The state is what
carries them elsewhere: to a new process, another replica, a copy of the checkpoint. A checkpoint from before a
retraction carries none: where an exact one must hold in its forks on another session too, give the session a ledger
file.
"""

from __future__ import annotations

import asyncio
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
from langchain.agents.structured_output import AutoStrategy, OutputToolBinding, ToolStrategy
from langchain_core.messages import SystemMessage
from langgraph.runtime import Runtime
from langgraph.types import Command

from kv_retract.session import KVRetractSession

from .approval import Decisions, approved_in, ask, merge_decisions
from .chat_model import ChatKVRetract, throw_away_thread
from .records import from_state, merge, to_state
from .redaction import redact
from .threads import current_thread
from .tools import to_openai_tools

Request = ModelRequest[Any]
Response = ModelResponse[Any] | ExtendedModelResponse[Any]


class RetractionState(AgentState[Any]):
    """What the middleware adds to an agent's state; hidden from input and output, not from streams of the state."""

    kv_retractions: NotRequired[Annotated[list[dict[str, Any]], PrivateStateAttr, merge]]
    """`RetractionRecord.to_json` of every retraction of the thread; no tensors, no retracted text."""


class ApprovalState(RetractionState):
    """As `RetractionState`, with what people decided."""

    kv_decisions: NotRequired[Annotated[Decisions, PrivateStateAttr, merge_decisions]]
    """Approved and denied proposals of policies under `require_approval`, by id."""


class KVRetractMiddleware(AgentMiddleware[RetractionState, Any, Any]):
    """Carries retractions in the agent's state and gives each model call its thread.

    Args:
        session: the one that the agent's `ChatKVRetract` answers through.
        redact: also replace what was taken back in the messages of the state (`redaction.redact`). The text is gone
            from there for good: an undo cannot bring it back. Older checkpoints still hold it (`purge_checkpoints`).
        name: as shown in traces and graphs; two middlewares of one agent need different ones.
    """

    state_schema: type[RetractionState] = RetractionState
    tools = ()

    def __init__(self, session: KVRetractSession, *, redact: bool = False, name: str = "kv_retract") -> None:
        super().__init__()
        self.session = session
        self.redact = redact
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
        response = handler(self._prepared(request, thread_id))
        return self._with_records(request, response, thread_id)

    async def awrap_model_call(
        self, request: Request, handler: Callable[[Request], Awaitable[ModelResponse[Any]]]
    ) -> Response:
        """As `wrap_model_call`."""
        thread_id = self._enter(request)
        response = await handler(self._prepared(request, thread_id))
        return self._with_records(request, response, thread_id)

    def _enter(self, request: Request) -> str:
        model = request.model
        if not isinstance(model, ChatKVRetract) or model.session is not self.session:
            raise ValueError(
                f"middleware {self.name!r} expected a ChatKVRetract on its own session as the agent's model, got "
                f"{type(model).__name__}{' on another session' if isinstance(model, ChatKVRetract) else ''}; pass "
                f"create_agent(ChatKVRetract(session=session), middleware=[{type(self).__name__}(session)])"
            )
        thread_id = request.model_settings.get("thread_id") or model.thread_id or current_thread()
        # Without a thread the state still lives as long as the run: it carries the records from call to call.
        thread_id = thread_id or throw_away_thread()
        self.session.restore(thread_id, from_state(_records(request.state)))
        return str(thread_id)

    def _prepared(self, request: Request, thread_id: str) -> Request:
        return request.override(model_settings={**request.model_settings, "thread_id": thread_id})

    def _with_records(self, request: Request, response: ModelResponse[Any], thread_id: str) -> Response:
        update: dict[str, Any] = {}
        if self.redact:
            redaction = redact(request.state["messages"], self.session.history(thread_id), thread_id=thread_id)
            if redaction.messages:
                # The records first: should the state not be written, the next call redacts and finds them known.
                self.session.restore(thread_id, redaction.records)
                update["messages"] = list(redaction.messages)
        records = to_state(self.session.history(thread_id))
        if records != _records(request.state):
            update["kv_retractions"] = records
        return ExtendedModelResponse(model_response=response, command=Command(update=update)) if update else response


class KVRetractApprovalMiddleware(KVRetractMiddleware):
    """Also asks people about what policies under `require_approval` propose, by an interrupt before the model call.

    It asks in a node of its own, so the agent's graph has one more. The value of the interrupt lists the proposals
    (`approval.ask`). Resume with True or False for all that were asked, `{id: True}`, or
    `{"approved": [ids], "denied": [ids], "actor": "name"}`. What was approved is taken back before the model reads
    anything; what was denied is not asked again; what was left open is asked before the next model call.

    Places and effects in the question are those of the messages in the state, with system prompt and tools of the
    model call before. The retraction itself is made on exactly what the model reads.

    Args:
        session: see the base class.
        show_text: show the beginning of what would be taken back. The question is checkpointed and streamed.
        redact: see the base class.
        name: see the base class.
    """

    state_schema = ApprovalState

    def __init__(
        self,
        session: KVRetractSession,
        *,
        show_text: bool = False,
        redact: bool = False,
        name: str = "kv_retract",
    ) -> None:
        super().__init__(session, redact=redact, name=name)
        self.show_text = show_text
        self._read_before: tuple[list[SystemMessage], list[dict[str, Any]] | None] = [], None

    def before_model(self, state: ApprovalState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # type: ignore[override]
        """Ask about what waits.

        Raises:
            ValueError: the run has no thread, so that nobody could answer; or the answer is not understood.
        """
        thread_id = current_thread()
        if thread_id is None:
            raise ValueError(
                f"middleware {self.name!r} needs a thread to ask in; give the agent a checkpointer, and invoke it with "
                '{"configurable": {"thread_id": ...}}'
            )
        self.session.restore(thread_id, from_state(_records(state)))
        system, tools = self._read_before
        decisions = ask(
            self.session,
            thread_id,
            state["messages"],
            state.get("kv_decisions") or {},
            before=system,
            tools=tools,
            show_text=self.show_text,
        )
        return {"kv_decisions": decisions} if decisions else None

    async def abefore_model(self, state: ApprovalState, runtime: Runtime[Any]) -> dict[str, Any] | None:  # type: ignore[override]
        """As `before_model`, beside the event loop."""
        return await asyncio.to_thread(self.before_model, state, runtime)

    def _prepared(self, request: Request, thread_id: str) -> Request:
        if thread_id != current_thread():
            raise ValueError(
                f"middleware {self.name!r} asks in the thread of the run, {current_thread()!r}, but the model answers "
                f"in {thread_id!r}; leave thread_id out of the model"
            )
        tools = to_openai_tools(_tools_of(request)) or None
        self._read_before = [request.system_message] if request.system_message else [], tools
        decisions: Decisions = request.state.get("kv_decisions") or {}  # type: ignore[assignment]
        settings = {**request.model_settings, "thread_id": thread_id, "retract_approved": approved_in(decisions)}
        return request.override(model_settings=settings)


def _tools_of(request: Request) -> list[Any]:
    """Return the tools that the agent binds, those for a structured answer too."""
    form = request.response_format
    if isinstance(form, AutoStrategy):
        form = ToolStrategy(schema=form.schema)
    specs = form.schema_specs if isinstance(form, ToolStrategy) else []
    return [*request.tools, *(OutputToolBinding.from_schema_spec(spec).tool for spec in specs)]


def _records(state: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = state.get("kv_retractions") or []
    return records
