"""KVRetractMiddleware in `create_agent`: retractions between model calls, kept in private state."""

import json

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver

from kv_retract import Guarantee, Message, Scope, Status
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractMiddleware
from kv_retract.integrations.langchain.messages import to_messages
from kv_retract.integrations.langchain.tools import to_openai_tools
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.testing.spy import prefilled_texts

QUESTION = {"messages": [("user", "What does tea cost now?")]}
SHOP = {"configurable": {"thread_id": "shop"}}


def result(price):
    """The price as the tool's answer, not as an assistant message that repeats it."""
    return f"{price}\n</tool_response>"


def answers(messages):
    return [m for m in messages if m.type == "ai"]


def prices_heard():
    """A conversation in which the tool has answered twice."""
    messages = []
    for number, price in enumerate(("12 EUR", "15 EUR")):
        call = {"name": "get_price", "args": {"item": "tea"}, "id": f"call-{number}"}
        messages += [
            HumanMessage("What does tea cost now?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage(price, tool_call_id=call["id"], name="get_price"),
            AIMessage(f"Tea costs {price}."),
        ]
    return messages


async def ask(agent, how):
    """Ask once, and return the thread's messages afterwards."""
    if how == "invoke":
        agent.invoke(QUESTION, SHOP)
    elif how == "ainvoke":
        await agent.ainvoke(QUESTION, SHOP)
    elif how == "stream":
        list(agent.stream(QUESTION, SHOP, stream_mode="messages"))
    else:
        [_ async for _ in agent.astream(QUESTION, SHOP, stream_mode="messages")]
    return agent.get_state(SHOP).values["messages"]


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
async def test_older_prices_are_retracted_before_the_model_reads_the_newest(shop, how):
    agent, session = shop(checkpointer=InMemorySaver())
    with prefilled_texts(session) as texts:
        messages = [await ask(agent, how) for _ in range(3)][-1]
    assert [a.text for a in answers(messages)[1::2]] == ["Tea costs 12 EUR.", "Tea costs 15 EUR.", "Tea costs 19 EUR."]
    assert "".join(texts).count(result("12 EUR")) == 1, "read once, when it was new"

    first, second = session.history("shop")
    assert [r.span.message for r in (first, second)] == [2, 6]
    assert {r.policy for r in (first, second)} == {"superseded"} and first.status is Status.STEERED
    assert [a.response_metadata["retractions"] for a in answers(messages)] == [
        [],
        [],
        [],
        [first.retraction_id],
        [first.retraction_id],
        [first.retraction_id, second.retraction_id],
    ]
    session.engine.check_integrity()


def test_records_are_in_the_checkpoint_and_hidden_from_input_and_output(shop):
    agent, session = shop(checkpointer=InMemorySaver())
    outputs = [agent.invoke({**QUESTION, "kv_retractions": [{"not": "a record"}]}, SHOP) for _ in range(2)]
    assert [set(output) for output in outputs] == [{"messages"}, {"messages"}]
    assert "kv_retractions" not in agent.get_input_jsonschema()["properties"]
    assert "kv_retractions" not in agent.get_output_jsonschema()["properties"]
    kept = agent.get_state(SHOP).values["kv_retractions"]
    (record,) = session.history("shop")
    assert kept == [json.loads(json.dumps(record.to_json()))]
    assert "12 EUR" not in json.dumps(kept), "a record never holds what was retracted"


def test_nothing_retracted_writes_nothing(shop):
    agent, _ = shop(checkpointer=InMemorySaver())
    agent.invoke(QUESTION, SHOP)
    assert not agent.get_state(SHOP).values.get("kv_retractions")


def test_the_edited_thread_stays_cached(shop):
    agent, _ = shop(checkpointer=InMemorySaver())
    agent.invoke(QUESTION, SHOP)
    used = [a.usage_metadata for a in answers(agent.invoke(QUESTION, SHOP)["messages"])]
    assert used[0]["input_token_details"]["cache_read"] == 0
    for before, after in zip(used, used[1:], strict=False):
        # Also in the last call, before which a message was retracted.
        assert after["input_token_details"]["cache_read"] == before["total_tokens"]


def test_an_exact_retraction_leaves_the_thread_and_what_follows_is_recomputed(shop, new_session, new_get_price):
    used = {}
    for guarantee in Guarantee:
        policy = SupersededToolResult(guarantee=guarantee)
        session = new_session(name=f"exact-{guarantee}", policies=[policy])
        agent, _ = shop(session=session, tools=[new_get_price()], checkpointer=InMemorySaver())
        agent.invoke(QUESTION, SHOP)
        with prefilled_texts(session) as texts:
            used[guarantee] = agent.invoke(QUESTION, SHOP)["messages"][-1].usage_metadata
        (record,) = session.history("shop")
    # The loop ends with the exact one.
    assert (record.status, record.scope) == (Status.EXACT, Scope.THREAD)
    assert used["exact"]["input_tokens"] == used["steered"]["input_tokens"] - record.span_tokens
    assert result("12 EUR") not in "".join(texts) and "Tea costs 12 EUR." in "".join(texts)


@pytest.mark.parametrize("prompt", [None, "You work in a shop."])
def test_a_thread_that_lost_its_cache_is_rebuilt_without_the_text(shop, get_price, prompt):
    agent, session = shop(checkpointer=InMemorySaver(), system_prompt=prompt)
    agent.invoke(QUESTION, SHOP)
    messages = to_messages(agent.invoke(QUESTION, SHOP)["messages"])
    tools = to_openai_tools([get_price])
    system = [Message("system", prompt)] if prompt else []
    key = session.key("shop", [*system, *messages], tools=tools)
    assert (key.ids < 0).any(), "a steered span leaves tombstones"
    assert session.engine.drop(key, 0) > 200
    with prefilled_texts(session) as texts:
        reply = agent.invoke(QUESTION, SHOP)["messages"][-1]
    assert reply.text == "Tea costs 19 EUR."
    assert result("12 EUR") not in "".join(texts) and result("19 EUR") in "".join(texts)


def test_without_a_thread_the_state_carries_records_from_call_to_call(shop, get_price):
    agent, session = shop()
    for _ in range(2):
        get_price.invoke({"item": "tea"})  # the prices that were heard already
    with prefilled_texts(session) as texts:
        messages = agent.invoke({"messages": [*prices_heard(), *QUESTION["messages"]]})["messages"]
    first, second = (a.response_metadata["retractions"] for a in answers(messages)[-2:])
    assert len(first) == 1 and len(second) == 2
    # Each call has a thread of its own, whose name goes into the ids that it makes.
    assert second[0] == first[0]
    assert len(session.ledger.threads()) == 2 and all(t.startswith("stateless-") for t in session.ledger.threads())
    assert result("12 EUR") not in "".join(texts)


def test_the_thread_of_the_model_goes_before_that_of_the_run(shop, new_session):
    session = new_session(policies=[SupersededToolResult()])
    agent, _ = shop(
        session=session, model=ChatKVRetract(session=session, thread_id="mine"), checkpointer=InMemorySaver()
    )
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    assert session.ledger.threads() == ["mine"]
    assert len(agent.get_state(SHOP).values["kv_retractions"]) == 1


def test_threads_of_one_agent_do_not_share_retractions(shop):
    agent, session = shop(checkpointer=InMemorySaver())
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    other = {"configurable": {"thread_id": "other"}}
    messages = agent.invoke(QUESTION, other)["messages"]
    assert session.ledger.threads() == ["shop"]
    assert answers(messages)[-1].response_metadata["retractions"] == []


def test_streamed_messages_join_to_those_of_the_state(shop):
    agent, _ = shop(checkpointer=InMemorySaver())
    agent.invoke(QUESTION, SHOP)
    joined = {}
    for chunk, about in agent.stream(QUESTION, SHOP, stream_mode="messages"):
        if about["langgraph_node"] == "model":
            joined[chunk.id] = chunk if chunk.id not in joined else joined[chunk.id] + chunk
    kept = answers(agent.get_state(SHOP).values["messages"])[-2:]
    assert len(joined) == 2
    for chunk, message in zip(joined.values(), kept, strict=True):
        assert (chunk.text, chunk.tool_calls) == (message.text, message.tool_calls)
        assert chunk.usage_metadata == message.usage_metadata
        assert chunk.response_metadata == message.response_metadata


async def test_another_model_is_refused_with_a_remedy(shop, new_session):
    mine = new_session()
    remedy = r"pass create_agent\(ChatKVRetract\(session=session\), middleware=\[KVRetractMiddleware\(session\)\]\)"
    agent, _ = shop(session=mine, model=ChatKVRetract(session=new_session(name="another")))
    with pytest.raises(ValueError, match=f"'kv_retract' expected .* got ChatKVRetract on another session; {remedy}"):
        agent.invoke(QUESTION)
    agent, _ = shop(session=mine, model=FakeListChatModel(responses=["12 EUR"]))
    with pytest.raises(ValueError, match=f"got FakeListChatModel; {remedy}"):
        await agent.ainvoke(QUESTION)


def test_two_middlewares_of_one_agent_need_two_names(new_session, shop):
    session = new_session(policies=[SupersededToolResult()])
    model = ChatKVRetract(session=session)
    with pytest.raises(AssertionError, match="duplicate middleware"):
        create_agent(model, middleware=[KVRetractMiddleware(session), KVRetractMiddleware(session)])
    agent, _ = shop(session=session, outer=[KVRetractMiddleware(session, name="second")], checkpointer=InMemorySaver())
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    assert len(agent.get_state(SHOP).values["kv_retractions"]) == len(session.history("shop")) == 1


def test_a_damaged_record_in_the_state_is_an_error_not_a_silence(shop):
    agent, _ = shop(checkpointer=InMemorySaver())
    agent.invoke(QUESTION, SHOP)
    agent.update_state(SHOP, {"kv_retractions": [{"policy": "superseded"}]})
    with pytest.raises(ValueError, match="not a retraction record"):
        agent.invoke(QUESTION, SHOP)
