"""The node `retract_step` in hand-written graphs, before the node that calls the model."""

import threading
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.message import add_messages
from pydantic import BaseModel

from kv_retract import Message, RetractionPolicy
from kv_retract.integrations.langchain import ChatKVRetract
from kv_retract.integrations.langchain.messages import to_messages
from kv_retract.integrations.langchain.records import merge
from kv_retract.integrations.langchain.tools import to_openai_tools
from kv_retract.integrations.langgraph import current_thread, retract_step, thread_of
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.testing.spy import prefilled_texts

SHOP = {"configurable": {"thread_id": "shop"}}
PROMPT = "You work in a shop."


class DictState(MessagesState):
    retractions: list[dict[str, Any]]


@dataclass
class DataclassState:
    messages: Annotated[list, add_messages] = field(default_factory=list)
    retractions: list[dict[str, Any]] = field(default_factory=list)


class PydanticState(BaseModel):
    messages: Annotated[list, add_messages] = []
    retractions: list[dict[str, Any]] = []


class WithoutRecords(MessagesState):
    pass


def read(state, key):
    return state[key] if isinstance(state, dict) else getattr(state, key)


def conversation():
    """Two prices heard; the newer one waits for an answer."""
    messages = []
    for number, price in enumerate(("12 EUR", "15 EUR")):
        call = {"name": "get_price", "args": {"item": "tea"}, "id": f"call-{number}"}
        messages += [
            HumanMessage("What does tea cost now?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage(price, tool_call_id=call["id"], name="get_price"),
            AIMessage(f"Tea costs {price}."),
        ]
    return messages[:-1]


def graph_of(session, schema, tools, *, prompt=None, saver=None, named=None, **options):
    """retract -> model, both with the same tools and system prompt."""
    model = ChatKVRetract(session=session).bind_tools(tools)
    first = [SystemMessage(prompt)] if prompt else []
    named = {"tools": tools, "system_prompt": prompt, **(named or {})}

    def call_model(state):
        return {"messages": [model.invoke([*first, *read(state, "messages")])]}

    graph = StateGraph(schema)
    graph.add_node("retract", retract_step(session, **named, **options))
    graph.add_node("model", call_model)
    graph.add_edge(START, "retract")
    graph.add_edge("retract", "model")
    graph.add_edge("model", END)
    return graph.compile(checkpointer=saver)


def warm(session, tools, prompt=None):
    """Bring the conversation into the cache, the older price included."""
    system = [Message("system", prompt)] if prompt else []
    policies, session.policies = session.policies, ()
    session.step("shop", [*system, *to_messages(conversation())], tools=to_openai_tools(tools))
    session.policies = policies


@pytest.fixture
def session(new_session):
    return new_session(policies=[SupersededToolResult()])


@pytest.mark.parametrize("schema", [DictState, DataclassState, PydanticState])
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_the_node_edits_the_cache_that_the_model_node_finds(session, get_price, schema, prompt):
    warm(session, [get_price], prompt)
    graph = graph_of(session, schema, [get_price], prompt=prompt, records_key="retractions")
    updates = {}
    with prefilled_texts(session) as texts:
        for update in graph.stream({"messages": conversation()}, SHOP, stream_mode="updates"):
            updates.update(update)
    (record,) = session.history("shop")
    assert record.span.message == (3 if prompt else 2)
    assert record.status == "steered", "the node found the thread in the cache: same prompt, same tools"
    assert [e["retraction_id"] for e in updates["retract"]["retractions"]] == [record.retraction_id]
    reply = updates["model"]["messages"][-1]
    assert reply.response_metadata["retractions"] == [record.retraction_id]
    assert reply.text == "Tea costs 15 EUR."
    usage = reply.usage_metadata
    assert usage["input_token_details"]["cache_read"] == usage["input_tokens"] - 1, "only the last token runs again"
    assert "EUR\n" not in "".join(texts), "no tool result went through the model"


async def test_async_is_the_same(session, get_price):
    warm(session, [get_price])
    graph = graph_of(session, DictState, [get_price], records_key="retractions")
    state = await graph.ainvoke({"messages": conversation()}, SHOP)
    (record,) = session.history("shop")
    assert record.status == "steered"
    assert [e["retraction_id"] for e in state["retractions"]] == [record.retraction_id]
    assert state["messages"][-1].text == "Tea costs 15 EUR."


@pytest.mark.parametrize("forgotten", ["tools", "system_prompt"])
def test_what_the_model_node_reads_must_be_named(session, get_price, forgotten):
    """Without it the node looks for another thread than the one in the cache: its span is not cached there."""
    warm(session, [get_price], PROMPT)
    graph = graph_of(session, WithoutRecords, [get_price], prompt=PROMPT, named={forgotten: ()})
    with prefilled_texts(session) as texts:
        state = graph.invoke({"messages": conversation()}, SHOP)
    assert session.history("shop")[0].status == "exact"
    assert "12 EUR\n" not in "".join(texts), "it costs time, not safety"
    assert len(state["messages"][-1].response_metadata["retractions"]) == 1


def test_without_records_key_only_the_ledger_knows(session, get_price):
    graph = graph_of(session, WithoutRecords, [get_price])
    state = graph.invoke({"messages": conversation()}, SHOP)
    assert set(state) == {"messages"}
    assert len(session.history("shop")) == 1


def test_records_of_the_state_reach_another_session(session, new_session, get_price):
    saver = InMemorySaver()
    graph_of(session, DictState, [get_price], records_key="retractions", saver=saver).invoke(
        {"messages": conversation()}, SHOP
    )
    replica = new_session(name="replica")
    graph = graph_of(replica, DictState, [get_price], records_key="retractions", saver=saver)
    with prefilled_texts(replica) as texts:
        state = graph.invoke({"messages": [("user", "What does tea cost now?")]}, SHOP)
    assert "12 EUR\n" not in "".join(texts) and "15 EUR\n" in "".join(texts)
    assert [r.retraction_id for r in replica.history("shop")] == [r.retraction_id for r in session.history("shop")]
    assert state["messages"][-1].response_metadata["retractions"] == [session.history("shop")[0].retraction_id]


def test_running_it_again_changes_nothing(session, get_price):
    node = retract_step(session, records_key="retractions", tools=[get_price])
    first = node.invoke({"messages": conversation()}, SHOP)
    again = node.invoke({"messages": conversation(), **first}, SHOP)
    assert len(first["retractions"]) == 1 and again == first


def test_messages_under_another_key(session):
    node = retract_step(session, messages_key="chat")
    assert node.invoke({"chat": conversation()}, SHOP) == {}
    assert len(session.history("shop")) == 1
    for state in ({"messages": conversation()}, DataclassState(messages=conversation())):
        with pytest.raises(ValueError, match="expected messages under 'chat' in the state; pass messages_key"):
            node.invoke(state, SHOP)


async def test_the_event_loop_is_not_blocked(new_session):
    threads = []

    @dataclass(kw_only=True)
    class Look(RetractionPolicy):
        name = "look"

        def propose(self, ctx):
            threads.append(threading.get_ident())
            return []

    await retract_step(new_session(policies=[Look()])).ainvoke({"messages": conversation()}, SHOP)
    assert len(threads) == 1 and threads[0] != threading.get_ident()


async def test_a_run_without_a_thread_is_refused(session):
    node = retract_step(session)
    remedy = r'needs a thread; invoke with \{"configurable": \{"thread_id": ...\}\}'
    with pytest.raises(ValueError, match=remedy):
        node.invoke({"messages": conversation()})
    with pytest.raises(ValueError, match=remedy):
        await node.ainvoke({"messages": conversation()}, {"configurable": {}})
    assert session.ledger.threads() == []


def test_the_thread_of_a_run():
    assert thread_of({}) is None and thread_of({"configurable": None}) is None
    assert thread_of({"configurable": {"thread_id": 7}}) == "7"
    assert current_thread() is None, "outside of a run"

    graph = StateGraph(dict)
    seen = []
    graph.add_node("look", lambda state: seen.append(current_thread()) or {})
    graph.add_edge(START, "look")
    compiled = graph.compile()
    compiled.invoke({}, SHOP)
    compiled.invoke({})
    assert seen == ["shop", None]


def test_parallel_nodes_with_a_reducer_keep_one_record(session, get_price):
    class Merged(MessagesState):
        retractions: Annotated[list[dict[str, Any]], merge]

    node = retract_step(session, records_key="retractions", tools=[get_price])
    graph = StateGraph(Merged)
    for name in ("a", "b"):
        graph.add_node(name, node)
        graph.add_edge(START, name)
    state = graph.compile().invoke({"messages": conversation()}, SHOP)
    assert len(session.history("shop")) == len(state["retractions"]) == 1


def test_merging_keeps_the_newest_form_of_each_record():
    older, newer = {"retraction_id": "a", "status": "steered"}, {"retraction_id": "a", "status": "exact"}
    other = {"retraction_id": "b", "status": "steered"}
    assert merge([older, other], [newer]) == [newer, other]
    assert merge([older], [newer, other, other]) == [newer, other]
    assert merge([older], []) == [older]
