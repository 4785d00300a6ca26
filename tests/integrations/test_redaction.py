"""Redaction: what was taken back leaves the agent's state, by messages with the same ids."""

import json
from dataclasses import replace

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRetryMiddleware, wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph.message import add_messages
from langgraph.types import Command

from kv_retract import Guarantee, Retraction, Scope, SpanRef, Status
from kv_retract.errors import SpanError
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractApprovalMiddleware, KVRetractMiddleware
from kv_retract.integrations.langchain.messages import to_messages
from kv_retract.integrations.langchain.records import to_state
from kv_retract.integrations.langchain.redaction import PLACEHOLDER, redact
from kv_retract.ledger.ledger import MemoryLedger, applicable
from kv_retract.ledger.windows import record_for
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.policies.supervised import RequireApproval
from kv_retract.spans import text_of
from kv_retract.testing.spy import prefilled_texts

QUESTION = {"messages": [("user", "What does tea cost now?")]}
SHOP = {"configurable": {"thread_id": "shop"}}
SECRET = "sk-4711"


def result(price):
    """The price as the tool's answer, not as an assistant message that repeats it."""
    return f"{price}\n</tool_response>"


def record(span, messages, *, status=Status.STEERED, **options):
    """A record as a session would make it."""
    retraction = Retraction(span=span, policy="p", reason="r", **options)
    made = record_for(
        retraction, to_messages(messages), thread_id="t", eraser_id="mask", closes_gap=False, shared=False,
        exact=False, now="2030-01-01", span_tokens=3,
    )  # fmt: skip
    return replace(made, status=status)


def redacted(messages, *spans, **options):
    """Return the messages of a state after redaction, and what was made anew."""
    messages = add_messages([], messages)
    redaction = redact(messages, [record(span, messages, **options) for span in spans], thread_id="t")
    return add_messages(messages, list(redaction.messages)), redaction.records


def tool_result(content, **options):
    return ToolMessage(content, tool_call_id="c", name="look", id="r", **options)


def call(arguments, **options):
    return AIMessage("", tool_calls=[{"name": "look", "args": arguments, "id": "c"}], id="a", **options)


# -- one message ----------------------------------------------------------------------------------------------------


def test_the_whole_content_goes_and_what_may_repeat_it():
    original = tool_result(f"key {SECRET}", artifact={"raw": SECRET}, additional_kwargs={"raw": SECRET})
    (message,), _ = redacted([original], SpanRef(0))
    assert message == ToolMessage(PLACEHOLDER, tool_call_id="c", name="look", id="r")
    assert SECRET not in repr(message) and SECRET in repr(original), "a copy: the original is not changed"


def test_ranges_of_a_content():
    text = "one two three four"
    (message,), records = redacted([HumanMessage(text, id="h")], SpanRef(0, start=4, end=7), SpanRef(0, start=14))
    assert message.text == "one [withdrawn] three [withdrawn]"
    assert [text_of(r.span, to_messages([message])) for r in records] == [PLACEHOLDER] * 2


def test_overlapping_ranges_are_one():
    spans = (SpanRef(0, start=4, end=13), SpanRef(0, start=8, end=18))
    (message,), _ = redacted([HumanMessage("one two three four", id="h")], *spans)
    assert message.text == "one [withdrawn]"


def test_a_range_over_text_blocks():
    blocks = [{"type": "text", "text": "one two", "annotations": ["two"]}, " thr", {"type": "text", "text": "ee four"}]
    (message,), _ = redacted([HumanMessage(blocks, id="h")], SpanRef(0, start=4, end=13))
    assert message.content == [{"type": "text", "text": "one [withdrawn]"}, "", {"type": "text", "text": " four"}]


@pytest.mark.parametrize(
    ("arguments", "cut", "left"),
    [
        ({"q": f"my {SECRET}", "n": 2}, SECRET, {"q": "my [withdrawn]", "n": 2}),
        ({"n": 4711}, "4711", {}),
        ({"a": SECRET, "b": 1}, f'{SECRET}", "b', {}),
        ({"a": "line\nend"}, "nend", {}),
    ],
    ids=["inside of a string", "a number", "over a key", "half an escape"],
)
def test_ranges_of_arguments_leave_valid_json(arguments, cut, left):
    at = json.dumps(arguments).index(cut)
    (message,), records = redacted([call(arguments)], SpanRef(0, "tool_call", 0, at, at + len(cut)))
    assert message.tool_calls == [{"name": "look", "args": left, "id": "c", "type": "tool_call"}]
    after = to_messages([message])
    assert {text_of(r.span, after) for r in records} == {PLACEHOLDER if left else "{}"}


def test_a_whole_call_keeps_its_id_and_its_name():
    blocks = [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "c", "name": "look", "input": {"q": SECRET}},
        {"type": "tool_use", "id": "d", "name": "look", "input": {"q": "other"}},
    ]
    calls = [{"name": "look", "args": {"q": q}, "id": id} for id, q in (("c", SECRET), ("d", "other"))]
    raw = {"tool_calls": [{"id": "c", "function": {"name": "look", "arguments": json.dumps({"q": SECRET})}}]}
    original = AIMessage(
        blocks, tool_calls=calls, id="a", additional_kwargs=raw, response_metadata={"logprobs": [SECRET], "model": "m"}
    )
    (message,), (anew,) = redacted([original], SpanRef(0, "tool_call"))
    assert [(c["id"], c["name"], c["args"]) for c in message.tool_calls] == [
        ("c", "look", {}),
        ("d", "look", {"q": "other"}),
    ]
    assert message.content == [blocks[0], {**blocks[1], "input": {}}, blocks[2]]
    assert message.response_metadata == {"model": "m"}
    assert SECRET not in repr(message)
    assert anew.span == SpanRef(0, "tool_call")


def test_a_malformed_call():
    original = AIMessage(
        "", invalid_tool_calls=[{"name": "look", "args": f'{{"q": {SECRET}', "id": "c", "error": SECRET}], id="a"
    )
    at = original.invalid_tool_calls[0]["args"].index(SECRET)
    (message,), _ = redacted([original], SpanRef(0, "tool_call", 0, at, at + len(SECRET)))
    assert message.invalid_tool_calls[0]["args"] == '{"q": [withdrawn]' and SECRET not in repr(message)


def test_what_cannot_be_replaced_is_refused():
    with pytest.raises(SpanError, match=r"message 0 \(tool\) has no id, so that nothing can replace it"):
        message = ToolMessage("x", tool_call_id="c")
        redact([message], [record(SpanRef(0), [message])], thread_id="t")


def test_what_was_undone_is_not_redacted():
    messages, records = redacted([tool_result("x")], SpanRef(0), status=Status.REVOKED)
    assert messages[0].text == "x" and records == ()


# -- records --------------------------------------------------------------------------------------------------------


def thread():
    return add_messages([], [HumanMessage("q"), call({"q": "x"}), tool_result("secret one"), HumanMessage("more")])


def test_redaction_is_idempotent():
    messages = thread()
    records = [record(SpanRef(2, start=0, end=6), messages), record(SpanRef(1, "tool_call"), messages)]
    first = redact(messages, records, thread_id="t")
    after = add_messages(messages, list(first.messages))
    assert [m.id for m in after] == [m.id for m in messages]
    assert redact(messages, records, thread_id="t") == first
    again = redact(after, [*records, *first.records], thread_id="t")
    assert (again.messages, again.records) == ((), ())


def test_records_stand_on_the_changed_messages():
    messages = thread()
    made = record(SpanRef(2, start=0, end=6), messages)
    redaction = redact(messages, [made], thread_id="t")
    after = to_messages(add_messages(messages, list(redaction.messages)))
    (anew,) = applicable([made, *redaction.records], after)
    assert text_of(anew.span, after) == PLACEHOLDER
    assert (anew.status, anew.scope, anew.derived_from) == (Status.EXACT, Scope.THREAD, (made.retraction_id,))
    assert applicable([made, *redaction.records], to_messages(messages)) == (made,), "forks of older checkpoints"


def test_what_was_undone_stays_known_when_a_later_message_is_redacted():
    messages = thread()
    undone = record(SpanRef(1, "tool_call", 0, 2, 3), messages, status=Status.REVOKED)
    made = record(SpanRef(2), messages)
    redaction = redact(messages, [undone, made], thread_id="t")
    assert {r.derived_from[0]: r.status for r in redaction.records} == {
        undone.retraction_id: Status.REVOKED,
        made.retraction_id: Status.EXACT,
    }
    (veto,) = [r for r in redaction.records if r.status is Status.REVOKED]
    assert veto.span == undone.span


def test_what_was_undone_moves_with_its_message():
    messages = add_messages([], [HumanMessage("one two three")])
    undone = record(SpanRef(0, start=8, end=13), messages, status=Status.REVOKED)
    redaction = redact(messages, [undone, record(SpanRef(0, start=0, end=3), messages)], thread_id="t")
    after = to_messages(redaction.messages)
    assert [text_of(r.span, after) for r in redaction.records] == [PLACEHOLDER, "three"]


def test_what_one_policy_undid_and_another_took_back_is_withdrawn():
    messages = thread()
    undone = record(SpanRef(2, start=0, end=6), messages[:3], status=Status.REVOKED)
    made = record(SpanRef(2, start=0, end=6), messages)
    redaction = redact(messages, [undone, made], thread_id="t")
    ledger = MemoryLedger()
    ledger.add("t", redaction.records)
    assert [r.status for r in ledger.records("t")] == [Status.EXACT]


# -- an agent -------------------------------------------------------------------------------------------------------


@pytest.fixture
def redacting_shop(new_session, get_price):
    """Build (agent, session): older prices are taken back, and leave the state."""

    def build(*, session=None, saver=None, outer=(), inner=(), guarantee="steered", kind=KVRetractMiddleware):
        session = session or new_session(policies=[SupersededToolResult(guarantee=guarantee)])
        agent = create_agent(
            ChatKVRetract(session=session),
            [get_price],
            middleware=[*outer, kind(session, redact=True), *inner],
            checkpointer=saver or InMemorySaver(),
        )
        return agent, session

    return build


def contents(agent):
    return [m.text for m in agent.get_state(SHOP).values["messages"]]


async def ask(agent, how):
    if how == "invoke":
        agent.invoke(QUESTION, SHOP)
    elif how == "ainvoke":
        await agent.ainvoke(QUESTION, SHOP)
    else:
        list(agent.stream(QUESTION, SHOP, stream_mode="messages"))


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream"])
async def test_an_agent_reads_on_without_what_its_state_lost(redacting_shop, how):
    agent, session = redacting_shop()
    await ask(agent, how)
    before = agent.get_state(SHOP).values["messages"]
    for _ in range(2):
        with prefilled_texts(session) as texts:
            await ask(agent, how)
    messages = agent.get_state(SHOP).values["messages"]
    assert [m.text for m in messages if m.type == "tool"] == [PLACEHOLDER, PLACEHOLDER, "19 EUR"]
    assert [m.text for m in messages if m.type == "ai"][1::2] == [f"Tea costs {n} EUR." for n in (12, 15, 19)]
    assert [m.id for m in messages[:4]] == [m.id for m in before]
    assert messages[2].tool_call_id == messages[1].tool_calls[0]["id"]
    assert result("12 EUR") not in "".join(texts)
    # Nobody takes the placeholder back: two retractions, and two for the changed messages.
    history = session.history("shop")
    assert [r.derived_from[0] for r in history if r.derived_from] == [
        r.retraction_id for r in history if not r.derived_from
    ]
    assert len(history) == 4
    standing = messages[-1].response_metadata["retractions"]
    assert set(standing) >= {r.retraction_id for r in history if r.derived_from and r.span.message == 2}
    session.engine.check_integrity()


@pytest.mark.parametrize("guarantee", list(Guarantee))
def test_it_costs_one_prefill_of_what_follows_where_the_thread_was_steered(redacting_shop, guarantee):
    agent, session = redacting_shop(guarantee=guarantee)
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    used = [m.usage_metadata for m in agent.invoke(QUESTION, SHOP)["messages"] if m.type == "ai"]
    # The fourth call retracts; its state is redacted with its answer.
    read, cached = used[3]["input_tokens"], used[4]["input_token_details"]["cache_read"]
    assert (cached < read) is (guarantee is Guarantee.STEERED), "an exact thread reads as it did before"


def test_a_thread_resumes_from_its_newest_checkpoint_without_the_text(redacting_shop, new_session, tmp_path):
    path = str(tmp_path / "checkpoints.sqlite")
    with SqliteSaver.from_conn_string(path) as saver:
        agent, first = redacting_shop(saver=saver)
        for _ in range(2):
            agent.invoke(QUESTION, SHOP)
        assert "12 EUR" not in contents(agent)
    with SqliteSaver.from_conn_string(path) as saver:
        second = new_session(name="restarted")
        agent, _ = redacting_shop(session=second, saver=saver)
        with prefilled_texts(second) as texts:
            reply = agent.invoke(QUESTION, SHOP)["messages"][-1]
    assert reply.text == "Tea costs 19 EUR." and result("12 EUR") not in "".join(texts)
    assert [r.retraction_id for r in second.history("shop")] == [r.retraction_id for r in first.history("shop")]


def test_a_retried_or_lost_model_call_redacts_once(redacting_shop):
    attempts = []

    @wrap_model_call
    def flaky(request, handler):
        response = handler(request)
        attempts.append(1)
        if len(attempts) % 2:
            raise ConnectionError("the answer was lost")
        return response

    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False, on_failure="error")
    agent, session = redacting_shop(outer=[retry, flaky])
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    assert [t for t in contents(agent) if t == PLACEHOLDER] == [PLACEHOLDER]
    assert len(session.history("shop")) == 2


def test_an_exact_retraction_holds_in_a_fork_of_an_older_checkpoint(redacting_shop):
    agent, session = redacting_shop(guarantee="exact")
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    before = next(s for s in agent.get_state_history(SHOP) if len(s.values.get("messages", ())) == 4)
    assert before.values["messages"][2].text == "12 EUR", "older checkpoints hold the original"
    with prefilled_texts(session) as texts:
        branch = agent.invoke(QUESTION, before.config)["messages"]
    assert result("12 EUR") not in "".join(texts) and branch[2].text == PLACEHOLDER


def test_an_undo_cannot_bring_back_what_the_state_lost(redacting_shop):
    agent, session = redacting_shop()
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    made = session.history("shop")[0]
    assert {r.retraction_id for r in session.undo("shop", made.retraction_id)} == {
        r.retraction_id for r in session.history("shop")
    }, "the record is revoked, with that of the changed message"
    with prefilled_texts(session) as texts:
        agent.invoke(QUESTION, SHOP)
    assert result(PLACEHOLDER) in "".join(texts) and result("12 EUR") not in "".join(texts)
    assert contents(agent)[2] == PLACEHOLDER


def test_with_approval_nobody_is_asked_about_a_placeholder(redacting_shop, new_session):
    session = new_session(policies=[RequireApproval(policy=SupersededToolResult())])
    agent, _ = redacting_shop(session=session, kind=KVRetractApprovalMiddleware)
    agent.invoke(QUESTION, SHOP)
    agent.invoke(QUESTION, SHOP)
    agent.invoke(Command(resume=True), SHOP)
    assert contents(agent)[2] == PLACEHOLDER
    (proposal,) = agent.invoke(QUESTION, SHOP)["__interrupt__"][0].value["proposals"]
    assert proposal["place"]["message"] == 6


# -- undo without redaction -----------------------------------------------------------------------------------------


def test_an_older_state_does_not_take_back_what_was_undone(shop):
    agent, session = shop(checkpointer=InMemorySaver())
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    (made,) = session.history("shop")
    session.undo("shop", made.retraction_id)
    assert agent.get_state(SHOP).values["kv_retractions"][0]["status"] == "steered"
    session.restore("shop", [made])
    assert session.history("shop")[0].status is Status.REVOKED
    with prefilled_texts(session) as texts:
        reply = agent.invoke(QUESTION, SHOP)["messages"][-1]
    assert result("12 EUR") in "".join(texts), "the next step reads the original again"
    assert made.retraction_id not in reply.response_metadata["retractions"]
    kept = {e["retraction_id"]: e["status"] for e in agent.get_state(SHOP).values["kv_retractions"]}
    assert kept[made.retraction_id] == "revoked"


@pytest.mark.parametrize("how", ["by the next step", "by update_state"])
def test_what_was_undone_stays_undone_in_a_new_process(shop, new_session, how):
    saver = InMemorySaver()
    agent, session = shop(checkpointer=saver)
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    (made,) = session.history("shop")
    session.undo("shop", made.retraction_id)
    if how == "by the next step":
        agent.invoke(QUESTION, SHOP)
    else:
        agent.update_state(SHOP, {"kv_retractions": to_state(session.history("shop"))})
    restarted = new_session(name="restarted", policies=[SupersededToolResult()])
    agent, _ = shop(session=restarted, checkpointer=saver)
    with prefilled_texts(restarted) as texts:
        agent.invoke(QUESTION, SHOP)
    assert {r.retraction_id: r.status for r in restarted.history("shop")}[made.retraction_id] is Status.REVOKED
    assert result("12 EUR") in "".join(texts)
