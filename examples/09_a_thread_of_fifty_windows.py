"""A LangGraph conversation of fifty windows: a fact from its beginning is known, withdrawn, and then not known.

At most 1,024 tokens are cached in the ordinary way. Older ones lie in a bi-layer cache, window by window (ACRE, arXiv
2412.12486), and what a question is about comes back from there.
"""

import random

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph

from kv_retract import KVRetractSession, PolicyContext, Retraction, RetractionPolicy, SpanRef
from kv_retract.engine.bilayer import BiLayer
from kv_retract.integrations.langchain import ChatKVRetract
from kv_retract.integrations.langgraph import retract_step

WINDOW, TIMES = 512, 50
THREAD = {"configurable": {"thread_id": "long-trip"}}
SMALL_TALK = ("The queue took {} minutes.", "The train is {} minutes late.", "It is {} miles from here.")
QUESTION = "What is the owner of order Kel-42?"


class WrongRecord(RetractionPolicy):
    """Takes a tool's result on an order back once the user says that it was of another one."""

    name = "wrong_record"

    def propose(self, ctx: PolicyContext) -> list[Retraction]:
        """Return the results, if any."""
        if "was of another order" not in ctx.messages[-1].content:
            return []
        results = [n for n, m in enumerate(ctx.messages) if m.role == "tool" and "Kel-42" in m.content]
        return [Retraction(span=SpanRef(n), policy=self.name, reason="said by the user") for n in results]


class State(MessagesState):
    """What the graph checkpoints."""

    retractions: list


def main() -> None:
    """Talk for fifty windows, ask, withdraw, ask again."""
    session = KVRetractSession.from_pretrained(
        policies=[WrongRecord(cascade="quoted")], long_thread=BiLayer(window=WINDOW, local=1024, ratio=16)
    )
    model = ChatKVRetract(session=session, max_tokens=24)
    graph = StateGraph(State)
    graph.add_node("retract", retract_step(session, records_key="retractions"))
    graph.add_node("answer", lambda state: {"messages": [model.invoke(state["messages"])]})
    for edge in ((START, "retract"), ("retract", "answer"), ("answer", END)):
        graph.add_edge(*edge)
    agent = graph.compile(checkpointer=InMemorySaver())

    def say(text: str) -> list[BaseMessage]:
        messages: list[BaseMessage] = agent.invoke({"messages": [HumanMessage(text)]}, THREAD)["messages"]
        return messages

    call = {"id": "call_1", "name": "get_owner", "args": {"order": "Kel-42"}}
    agent.update_state(THREAD, {"messages": [
        HumanMessage("Please look up the owner of order Kel-42."), AIMessage("", tool_calls=[call]),
        ToolMessage('{"result": "The owner of order Kel-42 is Tal."}', tool_call_id="call_1", name="get_owner"),
        AIMessage("Done."),
    ]})  # fmt: skip
    rng, tokens = random.Random(0), 0
    while tokens < TIMES * WINDOW:
        messages = say(" ".join(rng.choice(SMALL_TALK).format(rng.randrange(90)) for _ in range(75)))
        tokens = messages[-1].usage_metadata["input_tokens"]
    print(f"{tokens} tokens, {tokens / WINDOW:.0f} windows, {len(messages)} messages")
    print("before:", say(QUESTION)[-1].content)
    say("The record of Kel-42 was of another order.")
    for record in session.history("long-trip"):
        print(f"withdrawn: {record.span_tokens} tokens of message {record.span.message}, {record.status.value}")
    print("after:", say(QUESTION)[-1].content)


if __name__ == "__main__":
    main()
