"""ChatKVRetract: settings of a call, its thread, tool choices that hold, streams that equal answers, cancelling."""

import asyncio
import json
import threading
from dataclasses import dataclass, field

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph

from kv_retract import Message, Retraction, RetractionPolicy, SpanRef
from kv_retract.errors import ConstraintError, MessageError, ThreadBusyError
from kv_retract.integrations.langchain import ChatKVRetract
from kv_retract.testing.spy import prefilled_texts

HAIKUS = "Write me 2 haikus. Only include the haikus."
PRICE = "What does tea cost now?"
TALK = [HumanMessage("hello"), AIMessage("hello"), HumanMessage("how are you")]


@dataclass(kw_only=True)
class FirstAnswer(RetractionPolicy):
    """Takes the first answer of the model back, in every thread."""

    name = "first-answer"

    def propose(self, ctx):
        found = [i for i, m in enumerate(ctx.messages) if m.role == "assistant"][:1]
        return [Retraction(span=SpanRef(i), policy=self.name, reason="test") for i in found]


@dataclass(kw_only=True)
class WaitForLoop(RetractionPolicy):
    """Waits for the event loop: where that is blocked, it waits in vain."""

    name = "wait"
    turned: threading.Event = field(default_factory=threading.Event)
    seen: list[bool] = field(default_factory=list)

    def propose(self, ctx):
        self.seen.append(self.turned.wait(timeout=10))
        return []


def said(message):
    """What a message says, without its random ids."""
    calls = [(c["name"], c["args"]) for c in message.tool_calls]
    return message.text, calls, message.usage_metadata, message.response_metadata


def joined(chunks):
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


# -- which thread ---------------------------------------------------------------------------------------------------


@pytest.fixture
def session(new_session):
    return new_session(policies=[FirstAnswer()])


def in_graph(model):
    """Run the model in a node of a graph, on the thread `run`."""
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_edge(START, "model")
    return graph.compile().invoke({"messages": TALK}, {"configurable": {"thread_id": "run"}})["messages"][-1]


def test_the_thread_is_that_of_the_call_then_of_the_model_then_of_the_run(session):
    in_graph(ChatKVRetract(session=session, thread_id="field").bind(thread_id="call"))
    assert session.ledger.threads() == ["call"]
    in_graph(ChatKVRetract(session=session, thread_id="field"))
    assert session.ledger.threads() == ["call", "field"]
    in_graph(ChatKVRetract(session=session))
    assert session.ledger.threads() == ["call", "field", "run"]


def test_a_call_without_a_thread_has_one_of_its_own_and_shares_the_cache(session):
    model = ChatKVRetract(session=session)
    model.invoke(TALK)
    again = model.invoke(TALK)
    threads = session.ledger.threads()
    assert len(threads) == 2 and all(t.startswith("stateless-") for t in threads)
    assert again.usage_metadata["input_token_details"]["cache_read"] > 0


def test_the_answer_names_every_retraction_it_was_made_under(session):
    model = ChatKVRetract(session=session, thread_id="t")
    assert model.invoke(TALK[:1]).response_metadata["retractions"] == []
    message = model.invoke(TALK)
    (record,) = session.history("t")
    assert message.response_metadata == {
        "model_provider": "kv_retract",
        "model_name": session.engine.spec.name,
        "finish_reason": "stop",
        "retractions": [record.retraction_id],
    }


# -- settings -------------------------------------------------------------------------------------------------------


def test_stop_strings_of_the_call_go_before_those_of_the_model(session):
    whole = "Hello! How can I help you?"
    model = ChatKVRetract(session=session, stop=[" How"])
    assert ChatKVRetract(session=session).invoke("Hello").text == whole
    assert model.invoke("Hello").text == "Hello!"
    assert model.invoke("Hello", stop=[" can"]).text == "Hello! How"
    assert model.invoke("Hello", stop=[]).text == whole
    assert joined(model.stream("Hello", stop=["an I"])).text == "Hello! How c"


def test_seeded_sampling_is_repeatable_and_settings_of_the_call_win(session):
    greedy = ChatKVRetract(session=session, max_tokens=12)
    warm = ChatKVRetract(session=session, max_tokens=12, temperature=8.0, seed=1)
    texts = [warm.invoke("Hello").text, warm.invoke("Hello").text, warm.invoke("Hello", seed=2).text]
    assert texts[0] == texts[1] != texts[2]
    assert warm.invoke("Hello", temperature=0.0).text == greedy.invoke("Hello").text
    assert warm.invoke("Hello", top_k=1).text == warm.invoke("Hello", top_p=1e-6).text == greedy.invoke("Hello").text
    short = warm.invoke("Hello", max_tokens=2)
    assert short.usage_metadata["output_tokens"] == 2 and short.response_metadata["finish_reason"] == "length"


def test_unknown_settings_and_other_models_are_refused(chat):
    with pytest.raises(ValueError, match="unknown model settings logit_bias, penalty; known: max_tokens, model, "):
        chat.invoke("Hello", penalty=1, logit_bias={})
    with pytest.raises(ValueError, match=r"runs 'tool-model', got model='gpt'; make a ChatKVRetract for it"):
        chat.invoke("Hello", model="gpt")
    assert chat.invoke("Hello", model="tool-model", ls_anything=1).text == "Hello! How can I help you?"


def test_a_session_and_another_model_are_one_too_many(session):
    with pytest.raises(ValueError, match="expected a session or a model, got both: .* runs 'tool-model', .* 'random'"):
        ChatKVRetract(session=session, model="random")
    assert ChatKVRetract(session=session).model_name == "tool-model"
    assert ChatKVRetract(session=session, model="tool-model").session is session


def test_without_a_session_it_opens_one(tool_model_dir):
    model = ChatKVRetract(model=str(tool_model_dir))
    assert model.invoke("Hey").text == "Hey! What can I do?"
    assert model.session.eraser.eraser_id == "mask"
    assert model.profile["max_input_tokens"] == model.session.engine.spec.max_positions == 4096


def test_an_image_is_refused_before_anything_is_computed(chat):
    picture = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])
    with prefilled_texts(chat.session) as texts, pytest.raises(MessageError, match="message 1 .*image_url"):
        chat.invoke([SystemMessage("Look."), picture])
    assert texts == []


# -- tool choices, by grammar ---------------------------------------------------------------------------------------


@pytest.fixture
def tools(get_price):
    @tool
    def refund(reason: str, euros: int) -> str:
        """Pay back."""
        return ""

    return [get_price, refund]


def test_a_choice_is_enforced_whatever_the_model_wants(chat, tools):
    (get_price, _) = tools
    learnt = [("get_price", {"item": "tea"})]
    assert said(chat.bind_tools([get_price]).invoke(PRICE))[1] == learnt, "what it wants"

    silent = chat.bind_tools([get_price], tool_choice="none").invoke(PRICE)
    assert silent.tool_calls == [] and "<tool_call>" not in silent.text
    assert silent.response_metadata["finish_reason"] in ("stop", "length")

    # With the greeting it wants to speak.
    for choice in ("any", "required", True, "get_price", {"type": "function", "function": {"name": "get_price"}}):
        forced = chat.bind_tools([get_price], tool_choice=choice).invoke("Hello")
        assert [c["name"] for c in forced.tool_calls] == ["get_price"] and forced.text == "", choice
        assert forced.response_metadata["finish_reason"] == "tool_calls"
    assert chat.bind_tools([get_price], tool_choice="auto").invoke("Hello").tool_calls == []

    (call,) = chat.bind_tools(tools, tool_choice="refund").invoke(PRICE, max_tokens=3000).tool_calls
    assert call["name"] == "refund" and set(call["args"]) == {"reason", "euros"}
    assert isinstance(call["args"]["euros"], int)


def test_a_choice_that_cannot_be_met_is_an_error(chat, tools):
    with pytest.raises(ValueError, match=r"one of the tools \(get_price, refund\), got 'get_weather'"):
        chat.bind_tools(tools, tool_choice="get_weather")
    with pytest.raises(ValueError, match="asks for a tool call but no tool is bound"):
        chat.bind_tools([], tool_choice="any")
    with pytest.raises(ConstraintError, match="cannot be turned into a grammar"):
        impossible = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": False}}}
        impossible["parameters"]["required"] = ["a"]
        chat.bind_tools([impossible], tool_choice="any").invoke("Hello")


def test_strict_holds_calls_of_the_models_own_accord_to_their_schema(chat, get_price):
    coffee = {
        "name": "get_price",
        "description": "Look up the price of an item.",
        "parameters": {"properties": {"item": {"type": "string"}}, "required": ["item"], "type": "object"},
    }
    strict = json.loads(json.dumps(coffee))
    strict["parameters"]["properties"]["item"]["pattern"] = "^[a-z]{9,12}$"
    free, held = (
        chat.bind_tools([strict], strict=flag).invoke(PRICE, max_tokens=60).tool_calls for flag in (False, True)
    )
    assert len(free[0]["args"].get("item", "")) < 9
    assert 9 <= len(held[0]["args"]["item"]) <= 12


def test_parallel_tool_calls_can_be_turned_off(chat):
    @tool
    def ping() -> str:
        """Ping."""
        return ""

    wild = ChatKVRetract(session=chat.session, temperature=50.0, max_tokens=150)
    numbers = {
        parallel: [
            len(
                wild.bind_tools([ping], tool_choice="any", parallel_tool_calls=parallel).invoke("hi", seed=s).tool_calls
            )
            for s in range(4)
        ]
        for parallel in (True, False)
    }
    assert max(numbers[True]) > 1 and numbers[False] == [1, 1, 1, 1]


# -- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["Hello", HAIKUS, PRICE])
async def test_joined_chunks_are_the_message_that_invoke_returns(chat, get_price, question):
    model = chat.bind_tools([get_price]) if question == PRICE else chat
    model.invoke(question)  # from here on the prompt is cached
    whole = model.invoke(question)
    chunks = list(model.stream(question))
    assert said(joined(chunks)) == said(whole)
    assert said(joined([chunk async for chunk in model.astream(question)])) == said(whole)
    assert said(await model.ainvoke(question)) == said(whole)
    assert bool(whole.tool_calls) is (question == PRICE)
    with_text = [c for c in chunks if c.text]
    # The text of a call never shows up; any other comes as it is decoded.
    assert not with_text if question == PRICE else len(with_text) > whole.usage_metadata["output_tokens"] / 2


@pytest.mark.filterwarnings("ignore:.*is in beta")
async def test_callbacks_see_the_pieces(chat):
    class Collect(BaseCallbackHandler):
        def __init__(self):
            self.tokens = []

        def on_llm_new_token(self, token, **kwargs):
            self.tokens.append(token)

    seen, aseen = Collect(), Collect()
    list(chat.stream("Hello", {"callbacks": [seen]}))
    [_ async for _ in chat.astream("Hello", {"callbacks": [aseen]})]
    assert "".join(seen.tokens) == "Hello! How can I help you?"
    assert aseen.tokens == seen.tokens and len(seen.tokens) > 5

    events, aevents = Collect(), Collect()
    assert "".join(chat.stream_events("Hello", {"callbacks": [events]}, version="v3").text) == "".join(seen.tokens)
    stream = await chat.astream_events("Hello", {"callbacks": [aevents]}, version="v3")
    assert "".join([text async for text in stream.text]) == "".join(seen.tokens)
    assert events.tokens == aevents.tokens == seen.tokens


@pytest.mark.parametrize("how", ["ainvoke", "astream"])
async def test_the_event_loop_turns_while_the_model_works(new_session, how):
    policy = WaitForLoop()
    model = ChatKVRetract(session=new_session(policies=[policy]))

    async def turn():
        await asyncio.sleep(0.01)
        policy.turned.set()

    async def answer():
        if how == "ainvoke":
            return await model.ainvoke("Hello")
        return joined([chunk async for chunk in model.astream("Hello")])

    message, _ = await asyncio.gather(answer(), turn())
    assert policy.seen == [True]
    assert message.text == "Hello! How can I help you?"


async def freed(session, messages):
    """Wait until the thread can be edited, and return the plan."""
    proposal = Retraction(span=SpanRef(0), policy="test", reason="test")
    for _ in range(200):
        try:
            return session.retract("t", messages, proposals=[proposal])
        except ThreadBusyError:
            await asyncio.sleep(0.01)
    raise AssertionError("the thread is still streaming")


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_a_stream_frees_its_thread(new_session, how):
    session = new_session()
    model = ChatKVRetract(session=session, thread_id="t", temperature=50.0, seed=0)
    # One more message than the one that is retracted: the newest of the user is protected.
    messages = [Message("user", "hello"), Message("assistant", "hello"), Message("user", HAIKUS)]
    given = [(m.role, m.content) for m in messages]
    begun = asyncio.Event()

    async def consume():
        async for _ in model.astream(given):
            begun.set()

    if how == "cancel":
        task = asyncio.create_task(consume())
        await begun.wait()
    else:
        stream = model.astream(given)
        await anext(stream)
    with pytest.raises(ThreadBusyError):
        session.retract("t", messages, proposals=[Retraction(span=SpanRef(0), policy="test", reason="test")])
    if how == "cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await stream.aclose()
    assert len((await freed(session, messages)).spans) == 1
    session.engine.check_integrity()
    answer = await model.ainvoke("Hello", temperature=0.0)
    assert answer.text == "Hello! How can I help you?"


def test_leaving_a_synchronous_stream_frees_its_thread(new_session):
    session = new_session()
    model = ChatKVRetract(session=session, thread_id="t")
    stream = model.stream(TALK)
    next(stream)
    messages = [Message("user", "hello"), Message("assistant", "hello"), Message("user", "how are you")]
    proposals = [Retraction(span=SpanRef(0), policy="test", reason="test")]
    with pytest.raises(ThreadBusyError):
        session.retract("t", messages, proposals=proposals)
    stream.close()
    assert len(session.retract("t", messages, proposals=proposals).spans) == 1
    session.engine.check_integrity()
