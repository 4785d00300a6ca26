"""KVRetractMiddleware and what LangGraph does with checkpoints: restarts, interrupts, retries, time travel, forks."""

import pytest
from langchain.agents.middleware import HumanInTheLoopMiddleware, ModelRetryMiddleware, wrap_model_call
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.types import Command, interrupt

from kv_retract import Status
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.testing.spy import prefilled_texts

QUESTION = {"messages": [("user", "What does tea cost now?")]}
SHOP = {"configurable": {"thread_id": "shop"}}


def result(price):
    """The price as the tool's answer, not as an assistant message that repeats it."""
    return f"{price}\n</tool_response>"


def retractions(message):
    return message.response_metadata["retractions"]


def checkpoint(agent, *, messages, next_node=()):
    """Return the config of the checkpoint at which the thread had so many messages."""
    found = [s for s in agent.get_state_history(SHOP) if len(s.values.get("messages", ())) == messages]
    return next(s.config for s in found if s.next == tuple(next_node))


# -- another process ------------------------------------------------------------------------------------------------


def test_after_a_restart_the_checkpoint_alone_keeps_the_text_out(shop, new_session, tmp_path):
    path = str(tmp_path / "checkpoints.sqlite")
    with SqliteSaver.from_conn_string(path) as saver:
        agent, first = shop(checkpointer=saver)
        for _ in range(2):
            agent.invoke(QUESTION, SHOP)
    with SqliteSaver.from_conn_string(path) as saver:
        # No policy: what is retracted comes from the checkpoint.
        agent, second = shop(session=new_session(name="restarted"), checkpointer=saver)
        assert second.history("shop") == []
        with prefilled_texts(second) as texts:
            reply = agent.invoke(QUESTION, SHOP)["messages"][-1]
        kept = agent.get_state(SHOP).values["kv_retractions"]
    assert reply.text == "Tea costs 19 EUR."
    assert result("12 EUR") not in "".join(texts) and result("15 EUR") in "".join(texts)
    (before,), (after,) = first.history("shop"), second.history("shop")
    assert retractions(reply) == [before.retraction_id] == [after.retraction_id]
    assert (before.status, after.status) == (Status.STEERED, Status.EXACT), "rebuilt without the span, and it says so"
    assert [entry["status"] for entry in kept] == ["exact"]


async def test_an_asynchronous_restart(shop, new_session, tmp_path):
    path = str(tmp_path / "checkpoints.sqlite")
    async with AsyncSqliteSaver.from_conn_string(path) as saver:
        agent, _ = shop(checkpointer=saver)
        for _ in range(2):
            await agent.ainvoke(QUESTION, SHOP)
    async with AsyncSqliteSaver.from_conn_string(path) as saver:
        agent, second = shop(session=new_session(name="restarted"), checkpointer=saver)
        with prefilled_texts(second) as texts:
            reply = (await agent.ainvoke(QUESTION, SHOP))["messages"][-1]
        kept = (await agent.aget_state(SHOP)).values["kv_retractions"]
    assert reply.text == "Tea costs 19 EUR."
    assert result("12 EUR") not in "".join(texts) and result("15 EUR") in "".join(texts)
    assert [entry["status"] for entry in kept] == ["exact"]


def test_a_crash_before_the_records_are_written_retracts_again(shop, new_session):
    saver = InMemorySaver()

    @wrap_model_call
    def crash(request, handler):
        handler(request)
        raise ConnectionError("the process died behind the model call")

    agent, first = shop(checkpointer=saver)
    agent.invoke(QUESTION, SHOP)
    agent.invoke(QUESTION, SHOP, interrupt_after=["tools"])
    crashing, _ = shop(session=first, checkpointer=saver, inner=[crash])
    with pytest.raises(ConnectionError):
        crashing.invoke(None, SHOP)
    assert len(first.history("shop")) == 1 and not agent.get_state(SHOP).values.get("kv_retractions")

    restarted = new_session(name="restarted", policies=[SupersededToolResult()])
    agent, _ = shop(session=restarted, checkpointer=saver)
    with prefilled_texts(restarted) as texts:
        agent.invoke(None, SHOP)
    assert result("12 EUR") not in "".join(texts) and result("15 EUR") in "".join(texts)
    assert [e["retraction_id"] for e in agent.get_state(SHOP).values["kv_retractions"]] == [
        first.history("shop")[0].retraction_id
    ]


# -- hooks that run again -------------------------------------------------------------------------------------------


def approve_answer():
    """A middleware that asks a person behind each model call: on resume the whole node runs again."""
    calls = []

    @wrap_model_call
    def approve(request, handler):
        response = handler(request)
        calls.append(len(request.messages))
        assert interrupt("Send this answer?") == "yes"
        return response

    return approve, calls


def test_a_model_call_that_is_interrupted_and_runs_again_retracts_once(shop):
    approve, calls = approve_answer()
    agent, session = shop(checkpointer=InMemorySaver(), inner=[approve])
    seen = []
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
        while agent.get_state(SHOP).next:
            seen.append(session.history("shop"))
            agent.invoke(Command(resume="yes"), SHOP)
    assert calls == [1, 1, 3, 3, 5, 5, 7, 7], "each call ran twice"
    assert len(seen[-1]) == 1, "made before the interrupt"
    assert session.history("shop") == seen[-1]
    values = agent.get_state(SHOP).values
    assert [e["retraction_id"] for e in values["kv_retractions"]] == [seen[-1][0].retraction_id]
    assert retractions(values["messages"][-1]) == [seen[-1][0].retraction_id]
    assert values["messages"][-1].text == "Tea costs 15 EUR."
    session.engine.check_integrity()


def test_an_interrupt_in_a_tool_does_not_bring_a_text_back(shop):
    prices = iter(["12 EUR", "15 EUR", "19 EUR"])

    @tool
    def get_price(item: str) -> str:
        """Look up the price of an item."""
        return interrupt("Which price?") and next(prices)

    agent, session = shop(checkpointer=InMemorySaver(), tools=[get_price])
    with prefilled_texts(session) as texts:
        for _ in range(3):
            assert agent.invoke(QUESTION, SHOP)["__interrupt__"][0].value == "Which price?"
            history = session.history("shop")
            reply = agent.invoke(Command(resume=True), SHOP)["messages"][-1]
    assert reply.text == "Tea costs 19 EUR."
    assert [r.span.message for r in session.history("shop")] == [2, 6]
    assert session.history("shop")[:1] == history
    assert "".join(texts).count(result("12 EUR")) == 1


def test_a_person_in_the_loop(shop):
    person = HumanInTheLoopMiddleware(interrupt_on={"get_price": True})
    agent, session = shop(checkpointer=InMemorySaver(), outer=[person])
    for _ in range(2):
        assert "__interrupt__" in agent.invoke(QUESTION, SHOP)
        reply = agent.invoke(Command(resume={"decisions": [{"type": "approve"}]}), SHOP)["messages"][-1]
    assert reply.text == "Tea costs 15 EUR."
    (record,) = session.history("shop")
    assert retractions(reply) == [record.retraction_id]


@pytest.mark.parametrize("order", ["retry outside", "retry inside"])
def test_a_retried_model_call_retracts_once(shop, order):
    attempts = []

    @wrap_model_call
    def flaky(request, handler):
        response = handler(request)
        attempts.append(len(session.history("shop")))
        if len(attempts) % 2:
            raise ConnectionError("the answer was lost")
        return response

    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False, on_failure="error")
    outer, inner = ([retry], [flaky]) if order == "retry outside" else ([], [retry, flaky])
    agent, session = shop(checkpointer=InMemorySaver(), outer=outer, inner=inner)
    for _ in range(2):
        reply = agent.invoke(QUESTION, SHOP)["messages"][-1]
    assert attempts == [0, 0, 0, 0, 0, 0, 1, 1]
    assert reply.text == "Tea costs 15 EUR." and len(retractions(reply)) == 1
    assert len(agent.get_state(SHOP).values["kv_retractions"]) == 1


# -- branches -------------------------------------------------------------------------------------------------------


def run_twice(shop, guarantee="steered"):
    agent, session = shop(checkpointer=InMemorySaver(), guarantee=guarantee)
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    (record,) = session.history("shop")
    return agent, session, record


@pytest.mark.parametrize("how", ["time travel", "update_state"])
@pytest.mark.parametrize(("guarantee", "sees"), [("steered", True), ("exact", False)])
def test_a_branch_from_before_a_retraction_sees_what_it_saw_then(shop, how, guarantee, sees):
    """Unless the retraction is exact: that holds in all of the thread (its scope)."""
    agent, session, record = run_twice(shop, guarantee)
    before = checkpoint(agent, messages=4)
    with prefilled_texts(session) as texts:
        if how == "time travel":
            branch = agent.invoke(QUESTION, before)["messages"]
        else:
            fork = agent.update_state(before, {"messages": [HumanMessage(QUESTION["messages"][0][1])]}, "__start__")
            branch = agent.invoke(None, fork)["messages"]
    assert len(branch) == 8
    assert (result("12 EUR") in "".join(texts)) is sees
    assert retractions(branch[5]) == ([] if sees else [record.retraction_id])
    # The branch hears a newer price of its own, and then takes the older one back too.
    assert len(retractions(branch[-1])) == 1
    assert (retractions(branch[-1]) == [record.retraction_id]) is not sees
    session.engine.check_integrity()


def test_a_branch_from_after_a_retraction_keeps_it(shop):
    agent, session, record = run_twice(shop)
    after = checkpoint(agent, messages=8)
    agent.invoke(QUESTION, SHOP)
    with prefilled_texts(session) as texts:
        branch = agent.invoke(QUESTION, after)["messages"]
    assert len(branch) == 12
    assert all(record.retraction_id in retractions(branch[i]) for i in (7, 9, 11))
    assert result("12 EUR") not in "".join(texts)


def test_the_newest_branch_is_as_it_was_after_a_visit_to_an_older_one(shop):
    agent, session, record = run_twice(shop)
    newest = agent.get_state(SHOP).config
    agent.invoke(QUESTION, checkpoint(agent, messages=4))
    with prefilled_texts(session) as texts:
        reply = agent.invoke(QUESTION, newest)["messages"][-1]
    assert reply.response_metadata["retractions"][0] == record.retraction_id
    assert result("12 EUR") not in "".join(texts)


def test_replaying_the_model_call_that_retracted_finds_it_made(shop):
    agent, session, record = run_twice(shop)
    replayed = agent.invoke(None, checkpoint(agent, messages=7, next_node=["model"]))["messages"]
    assert replayed[-1].text == "Tea costs 15 EUR." and retractions(replayed[-1]) == [record.retraction_id]
    assert session.history("shop") == [record]
    assert len(agent.get_state(SHOP).values["kv_retractions"]) == 1


def test_a_branch_on_a_replica_that_only_has_the_older_checkpoint(shop, new_session):
    """The records travel with the checkpoint: a fork from before a retraction carries none."""
    agent, _, record = run_twice(shop)
    before, after = checkpoint(agent, messages=4), checkpoint(agent, messages=8)
    replica = new_session(name="replica")
    other, _ = shop(session=replica, checkpointer=agent.checkpointer)
    with prefilled_texts(replica) as texts:
        other.invoke(QUESTION, before)
    assert result("12 EUR") in "".join(texts) and replica.history("shop") == []
    with prefilled_texts(replica) as texts:
        other.invoke(QUESTION, after)
    assert result("12 EUR") not in "".join(texts)
    assert [r.retraction_id for r in replica.history("shop")] == [record.retraction_id]
