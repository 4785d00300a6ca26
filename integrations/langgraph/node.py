"""A node that retracts, for hand-written graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

from kv_retract.session import KVRetractSession

from ..langchain.approval import approved_in, ask, merge_decisions, retract_approved
from ..langchain.messages import to_messages
from ..langchain.records import from_state, to_state
from ..langchain.threads import thread_of
from ..langchain.tools import Tool, to_openai_tools


def retract_step(
    session: KVRetractSession,
    *,
    messages_key: str = "messages",
    records_key: str | None = None,
    decisions_key: str | None = None,
    show_text: bool = False,
    system_prompt: str | None = None,
    tools: Sequence[Tool] = (),
) -> Runnable[Any, dict[str, Any]]:
    """Return a node that asks the policies and edits the cache; put it before the node that calls the model.

    A `ChatKVRetract` on the same session retracts by itself: the node moves the edit out of the model call, for
    example to where a graph waits anyway, and puts the records into the state. Running it again changes nothing.

    Args:
        session: the one that answers.
        messages_key: where the state has its messages.
        records_key: where the state keeps the retraction records, a list of JSON objects. They are merged into the
            session before, and written after. None: the session's ledger is the only place.
        decisions_key: where the state keeps what people decided about proposals of policies under `require_approval`, a
            JSON object. Naming it makes the node ask, by an interrupt, as `KVRetractApprovalMiddleware` does. None:
            what waits for approval goes on waiting.
        show_text: show in the question the beginning of what would be taken back.
        system_prompt: what the model node puts before the messages, if it does. It has to be the same, since the
            cache of the thread begins with it.
        tools: what the model node binds, for the same reason.

    Returns:
        A runnable, sync and async: state to state update.

    Raises:
        ValueError: at run time, where the run has no `thread_id`, the state no messages, or where an answer to the
            interrupt is not understood.
    """
    first = [SystemMessage(system_prompt)] if system_prompt else []
    openai_tools = to_openai_tools(tools) or None

    def retract(state: Any, config: RunnableConfig) -> dict[str, Any]:
        thread_id = thread_of(config)
        if thread_id is None:
            raise ValueError('retract_step needs a thread; invoke with {"configurable": {"thread_id": ...}}')
        messages = _get(state, messages_key)
        if messages is None:
            raise ValueError(f"retract_step expected messages under {messages_key!r} in the state; pass messages_key")
        if records_key is not None:
            session.restore(thread_id, from_state(_get(state, records_key)))
        neutral = to_messages([*first, *messages])
        update: dict[str, Any] = {}
        if decisions_key is not None:
            made = _get(state, decisions_key) or {}
            new = ask(session, thread_id, messages, made, before=first, tools=openai_tools, show_text=show_text)
            update[decisions_key] = merge_decisions(made, new)
            retract_approved(session, thread_id, neutral, approved_in(update[decisions_key]), tools=openai_tools)
        session.retract(thread_id, neutral, tools=openai_tools)
        if records_key is not None:
            update[records_key] = to_state(session.history(thread_id))
        return update

    # Called asynchronously, a lambda without a coroutine runs in a worker thread.
    return RunnableLambda(retract, name="retract")


def _get(state: Any, key: str) -> Any:
    """Read a key of a state that may be a dictionary, a dataclass or a Pydantic model; None where it is not there."""
    return state.get(key) if isinstance(state, Mapping) else getattr(state, key, None)
