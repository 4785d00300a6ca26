"""A hand-written graph on SQLite: a retraction survives the process, and a fork from before does not inherit it.

The bundled model knows no seats, so its answers mean little; what is kept and what is prefilled is real.
"""

import sqlite3
import tempfile
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AnyMessage, HumanMessage
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph, add_messages

from kv_retract import Explicit, KVRetractSession
from kv_retract.integrations.langchain import ChatKVRetract
from kv_retract.integrations.langgraph import retract_step

THREAD = {"configurable": {"thread_id": "trip-42"}}


class State(TypedDict):
    """What the graph checkpoints."""

    messages: Annotated[list[AnyMessage], add_messages]
    retractions: list[dict[str, Any]]


def build(checkpoints: SqliteSaver, *, withdraw: str | None) -> tuple[KVRetractSession, Any]:
    """Return a session and a graph of two nodes: retract, then answer."""
    policies = [Explicit(match=withdraw, reason="the user took it back")] if withdraw else []
    session = KVRetractSession.from_pretrained(policies=policies)
    model = ChatKVRetract(session=session, max_tokens=8)
    graph = StateGraph(State)
    graph.add_node("retract", retract_step(session, records_key="retractions"))
    graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "retract")
    graph.add_edge("retract", "answer")
    graph.add_edge("answer", END)
    return session, graph.compile(checkpointer=checkpoints)


def main() -> None:
    """Retract in one process, go on in another, and in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(Path(folder) / "checkpoints.sqlite", check_same_thread=False)
        session, graph = build(SqliteSaver(connection), withdraw="by the aisle, row 12")
        graph.invoke({"messages": [HumanMessage("I always sit by the aisle, row 12.")]}, THREAD)
        graph.invoke({"messages": [HumanMessage("Forget what I said about my seat.")]}, THREAD)
        print(f"first process: {len(session.history('trip-42'))} retraction, in the checkpoint")

        # Another process: nothing is cached, no policy runs; the checkpoint alone tells what was taken back.
        session, graph = build(SqliteSaver(connection), withdraw=None)
        graph.invoke({"messages": [HumanMessage("And now?")]}, THREAD)
        (record,) = session.history("trip-42")
        print(f"after a restart: {record.span_tokens} tokens left out, status {record.status.value}")

        # Time travel: at the end of the first turn nothing was withdrawn, and so it is for a run from there.
        before = [s for s in graph.get_state_history(THREAD) if not s.next][-1]
        state = graph.invoke({"messages": [HumanMessage("Which row do I like?")]}, before.config)
        used = state["messages"][-1].response_metadata["retractions"]
        print(f"fork from before: {len(used)} retractions apply")
        connection.close()


if __name__ == "__main__":
    main()
