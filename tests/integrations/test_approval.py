"""Approval by interrupt: what waits is asked, and only what people approved is taken back."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, ModelRetryMiddleware, wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel

from kv_retract import Message, Retraction, RetractionPolicy, SpanRef, Status
from kv_retract.events import Decided, Observer
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractApprovalMiddleware
from kv_retract.integrations.langchain.approval import ask, read_answer
from kv_retract.integrations.langchain.messages import to_messages
from kv_retract.integrations.langgraph import retract_step
from kv_retract.ledger.lineage import Derived, Lineage
from kv_retract.policies.explicit import Explicit
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.policies.supervised import RequireApproval
from kv_retract.testing.spy import prefilled_texts
from kv_retract.types import Evidence, Hop

QUESTION = {"messages": [("user", "What does tea cost now?")]}
SHOP = {"configurable": {"thread_id": "shop"}}
PROMPT = "You work in a shop."


def result(price):
    """The price as the tool's answer, not as an assistant message that repeats it."""
    return f"{price}\n</tool_response>"


def supervised(**options):
    return [RequireApproval(policy=SupersededToolResult(**options))]


def question(output):
    return output["__interrupt__"][0].value


def answered(output):
    return output["messages"][-1].response_metadata["retractions"]


def prices_heard(prices=("12 EUR", "15 EUR")):
    """A conversation in which the tool has answered; the newest price waits for an answer."""
    messages = []
    for number, price in enumerate(prices):
        call = {"name": "get_price", "args": {"item": "tea"}, "id": f"call-{number}"}
        messages += [
            HumanMessage("What does tea cost now?"),
            AIMessage("", tool_calls=[call]),
            ToolMessage(price, tool_call_id=call["id"], name="get_price"),
            AIMessage(f"Tea costs {price}."),
        ]
    return messages[:-1]


class Actors(Observer):
    """Remembers who decided."""

    def __init__(self):
        self.seen = []

    def on_event(self, event):
        if isinstance(event, Decided):
            self.seen.append(event.actor)


@pytest.fixture
def supervised_shop(new_session, get_price):
    """Build (agent, session): the prices of the tool are taken back only where somebody says so."""

    def build(*, outer=(), inner=(), session=None, saver=None, options=None, **agent):
        session = session or new_session(policies=supervised())
        middleware = [*outer, KVRetractApprovalMiddleware(session, **(options or {})), *inner]
        model = agent.pop("model", None) or ChatKVRetract(session=session)
        agent.setdefault("checkpointer", saver or InMemorySaver())
        return create_agent(model, agent.pop("tools", [get_price]), middleware=middleware, **agent), session

    return build


def two_questions(agent):
    agent.invoke(QUESTION, SHOP)
    return agent.invoke(QUESTION, SHOP)


# -- the question ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_the_question_says_what_would_be_done_and_holds_no_text(supervised_shop, prompt):
    agent, session = supervised_shop(system_prompt=prompt)
    asked = question(two_questions(agent))
    assert json.loads(json.dumps(asked)) == asked
    assert (asked["kind"], asked["thread_id"]) == ("kv_retract_approval", "shop")
    (proposal,) = asked["proposals"]
    message = agent.get_state(SHOP).values["messages"][2]
    assert message.text == "12 EUR"
    place = {"message": 2, "part": "content", "call": 0, "start": 0, "end": None}
    assert proposal["place"] == {**place, "message_id": message.id, "role": "tool", "name": "get_price"}
    assert (proposal["policy"], proposal["guarantee"], proposal["confidence"]) == ("superseded", "steered", 1.0)
    (span,) = proposal["spans"]
    assert span == {**span, **place, "exact": False, "why_exact": ""} and proposal["hops"] == []
    assert proposal["num_tokens"] == span["num_tokens"] > 0
    assert "12 EUR" not in json.dumps(asked)
    assert session.history("shop") == [], "asking changes nothing"


def test_a_person_may_be_shown_the_text(supervised_shop):
    agent, _ = supervised_shop(options={"show_text": True})
    (proposal,) = question(two_questions(agent))["proposals"]
    assert [span["text"] for span in proposal["spans"]] == ["12 EUR"]


def test_a_retraction_that_will_be_exact_is_announced_as_such(supervised_shop, new_session):
    agent, _ = supervised_shop(session=new_session(policies=supervised(guarantee="exact")))
    ((span,),) = (p["spans"] for p in question(two_questions(agent))["proposals"])
    assert (span["exact"], span["why_exact"]) == (True, "guarantee")


def test_the_question_is_planned_with_the_tools_of_a_structured_answer(new_session, get_price):
    """Else it would call every span of such an agent not cached."""

    class Answer(BaseModel):
        """Ignore."""

        text: str

    session, rendered = new_session(), []
    stream = session.stream
    session.stream = lambda *args, tools=None, **kw: (rendered.append(tools), stream(*args, tools=tools, **kw))[1]
    middleware = KVRetractApprovalMiddleware(session)
    model = ChatKVRetract(session=session, max_tokens=32)
    agent = create_agent(
        model, [get_price], middleware=[middleware], response_format=Answer, checkpointer=InMemorySaver()
    )
    list(agent.stream(QUESTION, SHOP, interrupt_after=["model"]))
    assert [tool["function"]["name"] for tool in middleware._read_before[1]] == ["get_price", "Answer"]
    assert middleware._read_before[1] == rendered[-1]


@dataclass(kw_only=True)
class QuoteLineage(Lineage):
    """A fake that knows of one hop: the assistant's sentence repeats the tool result before it."""

    def expand(self, proposals, messages, records=(), *, attention=None):
        hops, derived = [], []
        for p in proposals:
            target = SpanRef(p.span.message + 1)
            evidence = Evidence(kind="value", source=p.span, target=SpanRef(target.message, start=10, end=16), weight=6)
            hops.append(Hop(kind="quote", source=p.span, target=target, evidence=(evidence,)))
            derived.append(Retraction(span=target, policy=p.policy, reason="repeats it", derived_from=(p.span,)))
        return Derived((*proposals, *derived), tuple(hops))


def test_every_hop_of_a_cascade_is_in_the_question(supervised_shop, new_session):
    agent, session = supervised_shop(
        session=new_session(policies=supervised(), lineage=QuoteLineage()), system_prompt=PROMPT
    )
    (proposal,) = question(two_questions(agent))["proposals"]
    assert [span["message"] for span in proposal["spans"]] == [2, 3]
    (hop,) = proposal["hops"]
    assert (hop["kind"], hop["source"]["message"], hop["target"]["message"]) == ("quote", 2, 3)
    (evidence,) = hop["evidence"]
    assert evidence["target"] == {"message": 3, "part": "content", "call": 0, "start": 10, "end": 16}
    assert (evidence["kind"], evidence["weight"], evidence["source"]["message"]) == ("value", 6, 2)
    agent.invoke(Command(resume=True), SHOP)
    first, second = session.history("shop")
    assert second.derived_from == (first.retraction_id,)


# -- the answer -----------------------------------------------------------------------------------------------------


def everything(asked):
    return True


def by_mapping(asked):
    return {p["id"]: True for p in asked["proposals"]}


def by_lists(asked):
    return {"approved": [p["id"] for p in asked["proposals"]], "actor": "ada"}


@pytest.mark.parametrize(("answer", "actor"), [(everything, "approval"), (by_mapping, "approval"), (by_lists, "ada")])
def test_what_is_approved_is_taken_back_before_the_model_reads_on(supervised_shop, new_session, answer, actor):
    actors = Actors()
    agent, session = supervised_shop(
        session=new_session(policies=supervised(), observers=[actors]), system_prompt=PROMPT
    )
    asked = question(two_questions(agent))
    with prefilled_texts(session) as texts:
        output = agent.invoke(Command(resume=answer(asked)), SHOP)
    (record,) = session.history("shop")
    assert answered(output) == [record.retraction_id] and output["messages"][-1].text == "Tea costs 15 EUR."
    assert record.status is Status.STEERED, "found in the cache: same system prompt, same tools"
    assert actors.seen == [actor]
    assert result("12 EUR") not in "".join(texts)
    values = agent.get_state(SHOP).values
    assert values["kv_decisions"] == {asked["proposals"][0]["id"]: {"approved": True, "actor": actor}}
    assert [r["retraction_id"] for r in values["kv_retractions"]] == [record.retraction_id]
    assert "kv_decisions" not in output
    session.engine.check_integrity()


@pytest.mark.parametrize("deny", [lambda id: False, lambda id: {id: False}, lambda id: {"denied": [id]}])
def test_what_is_denied_stays_and_is_not_asked_again(supervised_shop, deny):
    agent, session = supervised_shop()
    (proposal,) = question(two_questions(agent))["proposals"]
    output = agent.invoke(Command(resume=deny(proposal["id"])), SHOP)
    assert answered(output) == [] and session.history("shop") == []
    (other,) = question(agent.invoke(QUESTION, SHOP))["proposals"]
    assert other["id"] != proposal["id"] and other["place"]["message"] == 6, "only the next price"


def test_what_is_left_open_is_asked_at_the_next_step(supervised_shop):
    agent, session = supervised_shop()
    (proposal,) = question(two_questions(agent))["proposals"]
    output = agent.invoke(Command(resume={"approved": []}), SHOP)
    assert answered(output) == []
    asked = [p["id"] for p in question(agent.invoke(QUESTION, SHOP))["proposals"]]
    assert asked == [proposal["id"]], "before the first call of the next question"
    output = agent.invoke(Command(resume=True), SHOP)
    (newer,) = question(output)["proposals"]
    assert newer["place"]["message"] == 6 and len(session.history("shop")) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("yes", "got str"),
        (1, "got int"),
        ([], "got list"),
        ({"approved": "ID"}, "lists of ids"),
        ({"approved": ["ID"], "denied": ["ID"]}, "both approved and denied: ID"),
        ({"approved": ["ID"], "actor": ""}, "actor is a name"),
        ({"approved": ["ffff"]}, "not asked: ffff"),
        ({"ffff": True}, "not asked: ffff"),
        ({"ID": "yes"}, "got dict"),
        ({"approved": ["ID"], "denyed": []}, "got dict"),
        ({"actor": "ada"}, "got dict"),
    ],
)
def test_another_answer_is_an_error_that_names_what_is_expected(wrong, why):
    with pytest.raises(ValueError, match=f"expected True or False for all .* about the proposals ID.*{why}.*again"):
        read_answer(wrong, ["ID"])


@pytest.mark.parametrize("wrong", ["yes", {"approved": ["ffff"]}, {"ffff": True}])
def test_after_a_wrong_answer_the_interrupt_can_be_resumed_again(supervised_shop, wrong):
    agent, session = supervised_shop()
    two_questions(agent)
    with pytest.raises(ValueError, match="resume the interrupt again"):
        agent.invoke(Command(resume=wrong), SHOP)
    assert session.history("shop") == []
    assert len(answered(agent.invoke(Command(resume=True), SHOP))) == 1


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in another graph"])
def test_a_plain_yes_approves_what_was_asked_and_nothing_that_was_found_since(supervised_shop, nested):
    saver = InMemorySaver()
    agent, session = supervised_shop(checkpointer=None if nested else saver)
    if nested:
        graph = StateGraph(MessagesState).add_node("agent", agent).add_edge(START, "agent")
        agent = graph.compile(checkpointer=saver)
    (asked,) = question(two_questions(agent))["proposals"]
    late = Explicit(match="Tea costs 12 EUR.", reason="found while people thought about it")
    session.policies = [*session.policies, RequireApproval(policy=late)]
    output = agent.invoke(Command(resume=True), SHOP)
    (record,) = session.history("shop")
    assert (record.policy, record.span.message) == ("superseded", asked["place"]["message"])
    assert answered(output) == [record.retraction_id]
    newer = question(agent.invoke(QUESTION, SHOP))["proposals"]
    assert [p["policy"] for p in newer] == ["explicit"]


# -- LangGraph ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ainvoke", "stream", "astream"])
async def test_other_ways_to_run_it(supervised_shop, how):
    agent, session = supervised_shop()

    async def run(given):
        if how == "ainvoke":
            await agent.ainvoke(given, SHOP)
        elif how == "stream":
            list(agent.stream(given, SHOP, stream_mode="messages"))
        else:
            [_ async for _ in agent.astream(given, SHOP, stream_mode="messages")]

    await run(QUESTION)
    await run(QUESTION)
    (pending,) = agent.get_state(SHOP).interrupts
    assert len(pending.value["proposals"]) == 1
    await run(Command(resume={pending.id: True}))
    messages = agent.get_state(SHOP).values["messages"]
    assert messages[-1].text == "Tea costs 15 EUR."
    assert answered({"messages": messages}) == [session.history("shop")[0].retraction_id]


@pytest.mark.parametrize("durable", [True, False], ids=["ledger file", "checkpoint only"])
def test_a_restart_between_question_and_answer(supervised_shop, new_session, tmp_path, durable):
    path, ledger = str(tmp_path / "checkpoints.sqlite"), tmp_path / "ledger.sqlite" if durable else None
    with SqliteSaver.from_conn_string(path) as saver:
        with new_session(policies=supervised(), ledger=ledger) as first:
            asked = question(two_questions(supervised_shop(session=first, saver=saver)[0]))
    with SqliteSaver.from_conn_string(path) as saver:
        with new_session(name="restarted", policies=supervised(), ledger=ledger) as second:
            agent, _ = supervised_shop(session=second, saver=saver)
            with prefilled_texts(second) as texts:
                output = agent.invoke(Command(resume=True), SHOP)
            assert [r.retraction_id for r in second.history("shop")] == answered(output)
            assert list(agent.get_state(SHOP).values["kv_decisions"]) == [asked["proposals"][0]["id"]]
    assert result("12 EUR") not in "".join(texts) and result("15 EUR") in "".join(texts)


async def test_an_asynchronous_restart_does_not_ask_about_what_was_denied(supervised_shop, new_session, tmp_path):
    path = str(tmp_path / "checkpoints.sqlite")
    async with AsyncSqliteSaver.from_conn_string(path) as saver:
        agent, _ = supervised_shop(saver=saver)
        for given in (QUESTION, QUESTION, Command(resume=False)):
            await agent.ainvoke(given, SHOP)
    async with AsyncSqliteSaver.from_conn_string(path) as saver:
        agent, session = supervised_shop(session=new_session(name="restarted", policies=supervised()), saver=saver)
        (proposal,) = question(await agent.ainvoke(QUESTION, SHOP))["proposals"]
        assert proposal["place"]["message"] == 6
        output = await agent.ainvoke(Command(resume=True), SHOP)
    assert answered(output) == [session.history("shop")[0].retraction_id]


def test_an_interrupt_behind_the_model_call_is_not_taken_for_an_approval(supervised_shop):
    """Both run again on resume: had they one node, the first would get the answer of the second."""

    @wrap_model_call
    def confirm(request, handler):
        response = handler(request)
        assert interrupt("Send this answer?") is True
        return response

    agent, session = supervised_shop(inner=[confirm])
    asked = []
    for given in (QUESTION, Command(resume=True), QUESTION, Command(resume=True), Command(resume=False)):
        output = agent.invoke(given, SHOP)
        while "__interrupt__" in output and question(output) == "Send this answer?" and given is not QUESTION:
            output = agent.invoke(Command(resume=True), SHOP)
        asked.append(question(output) if "__interrupt__" in output else output["messages"][-1].text)
    send = "Send this answer?"
    assert asked == [send, "Tea costs 12 EUR.", send, {**asked[3], "kind": "kv_retract_approval"}, "Tea costs 15 EUR."]
    assert session.history("shop") == []


def test_with_a_retry_and_a_person_in_the_loop(supervised_shop):
    attempts = []

    @wrap_model_call
    def flaky(request, handler):
        response = handler(request)
        attempts.append(1)
        if len(attempts) % 2:
            raise ConnectionError("the answer was lost")
        return response

    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False, on_failure="error")
    person = HumanInTheLoopMiddleware(interrupt_on={"get_price": True})
    agent, session = supervised_shop(outer=[retry, person], inner=[flaky])
    proceed = Command(resume={"decisions": [{"type": "approve"}]})
    agent.invoke(QUESTION, SHOP)
    agent.invoke(proceed, SHOP)
    agent.invoke(QUESTION, SHOP)
    (proposal,) = question(agent.invoke(proceed, SHOP))["proposals"]
    output = agent.invoke(Command(resume={proposal["id"]: True}), SHOP)
    assert answered(output) == [session.history("shop")[0].retraction_id]
    assert "__interrupt__" not in output


def test_a_branch_from_before_the_question_is_asked_anew(supervised_shop):
    agent, session = supervised_shop()
    two_questions(agent)
    agent.invoke(Command(resume=True), SHOP)
    before = next(s for s in agent.get_state_history(SHOP) if len(s.values.get("messages", ())) == 4)
    output = agent.invoke(QUESTION, before.config)
    assert len(question(output)["proposals"]) == 1
    assert answered(agent.invoke(Command(resume=False), SHOP)) == []
    assert len(session.history("shop")) == 1


def test_what_was_approved_and_undone_stays_undone(supervised_shop, new_session):
    """Also where a caller named the span: of those the planner would take the same characters again."""
    agent, session = supervised_shop(session=new_session())
    agent.invoke(QUESTION, SHOP)
    session.policies = [RequireApproval(policy=Explicit(match="Tea costs 12 EUR."))]
    agent.invoke(QUESTION, SHOP)
    (id,) = answered(agent.invoke(Command(resume=True), SHOP))
    session.undo("shop", id)
    output = agent.invoke(QUESTION, SHOP)
    assert answered(output) == [] and "__interrupt__" not in output
    assert [r.status for r in session.history("shop")] == [Status.REVOKED]


def test_a_run_without_a_thread_is_refused(supervised_shop):
    agent, _ = supervised_shop(checkpointer=False)
    with pytest.raises(ValueError, match="'kv_retract' needs a thread to ask in; give the agent a checkpointer"):
        agent.invoke(QUESTION)


def test_another_thread_of_the_model_is_refused(supervised_shop, new_session):
    session = new_session(policies=supervised())
    agent, _ = supervised_shop(session=session, model=ChatKVRetract(session=session, thread_id="mine"))
    with pytest.raises(ValueError, match="in the thread of the run, 'shop', but the model answers in 'mine'; leave"):
        agent.invoke(QUESTION, SHOP)


# -- the node -------------------------------------------------------------------------------------------------------


class State(MessagesState):
    retractions: list[dict[str, Any]]
    decisions: dict[str, Any]


def graph_of(session, tools, saver, **options):
    options = {"records_key": "retractions", "decisions_key": "decisions", "tools": tools, **options}
    model = ChatKVRetract(session=session).bind_tools(tools)
    graph = StateGraph(State)
    graph.add_node("retract", retract_step(session, **options))
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "retract")
    graph.add_edge("retract", "model")
    graph.add_edge("model", END)
    return graph.compile(checkpointer=saver)


@pytest.mark.parametrize("approve", [True, False])
async def test_the_node_asks_too(new_session, get_price, approve):
    session = new_session(policies=supervised())
    graph = graph_of(session, [get_price], InMemorySaver())
    (proposal,) = question(await graph.ainvoke({"messages": prices_heard()}, SHOP))["proposals"]
    assert proposal["place"]["message"] == 2 and session.history("shop") == []
    with prefilled_texts(session) as texts:
        state = await graph.ainvoke(Command(resume=approve), SHOP)
    ids = [r.retraction_id for r in session.history("shop")]
    assert len(ids) == approve and answered(state) == ids
    assert [r["retraction_id"] for r in state["retractions"]] == ids
    assert state["decisions"] == {proposal["id"]: {"approved": approve, "actor": "approval"}}
    assert (result("12 EUR") in "".join(texts)) is not approve
    again = graph.invoke({"messages": [("user", "What does tea cost now?")]}, SHOP)
    assert "__interrupt__" not in again and len(session.history("shop")) == approve


def test_without_decisions_key_the_node_asks_nobody(new_session, get_price):
    session = new_session(policies=supervised())
    graph = graph_of(session, [get_price], InMemorySaver(), decisions_key=None)
    assert "__interrupt__" not in graph.invoke({"messages": prices_heard()}, SHOP)
    assert session.history("shop") == []


def test_asking_reads_the_messages_as_the_model_does(new_session, get_price):
    """The system prompt is read, but places count in the messages of the state."""
    read = []

    @dataclass(kw_only=True)
    class Look(RetractionPolicy):
        name = "look"

        def propose(self, ctx):
            read.append(list(ctx.messages))
            return []

    session = new_session(policies=[RequireApproval(policy=Look())])
    graph = graph_of(session, [get_price], InMemorySaver(), system_prompt=PROMPT)
    graph.invoke({"messages": prices_heard()}, SHOP)
    expected = [Message("system", PROMPT), *to_messages(prices_heard())]
    assert read[0] == expected
    assert ask(session, "shop", [HumanMessage("hi")], {}) == {}, "nothing waits: no interrupt"
