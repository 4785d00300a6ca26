"""Purging older checkpoints: the thread goes on from its newest, and the bytes of a withdrawn text are gone."""

import sqlite3
from contextlib import ExitStack
from operator import add
from typing import Annotated

import aiosqlite
import pytest
from langchain.agents import create_agent
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from kv_retract.errors import UnsupportedError
from kv_retract.integrations.langchain import ChatKVRetract, KVRetractMiddleware
from kv_retract.integrations.langgraph import apurge_checkpoints, purge_checkpoints
from kv_retract.policies.superseded import SupersededToolResult
from kv_retract.testing.spy import prefilled_texts

QUESTION = {"messages": [("user", "What does tea cost now?")]}
SHOP = {"configurable": {"thread_id": "shop"}}
MARKER = "12 EUR"


class State(TypedDict):
    log: Annotated[list, add]


@pytest.fixture(params=["memory", "sqlite"])
def saver(request, tmp_path):
    with ExitStack() as stack:
        path = str(tmp_path / "checkpoints.sqlite")
        yield InMemorySaver() if request.param == "memory" else stack.enter_context(SqliteSaver.from_conn_string(path))


def everything(saver):
    """All that a checkpointer holds, as one text."""
    if isinstance(saver, InMemorySaver):
        return repr((dict(saver.storage), dict(saver.writes), saver.blobs))
    return "\n".join(saver.conn.iterdump())


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def chain(saver, *, ask=False):
    """A graph of two nodes, the second in a subgraph; it may stop in there, to ask."""

    def note(state):
        return {"log": ["inner " + (interrupt("go on?") if ask else "done")]}

    inner = StateGraph(State).add_node("before", lambda state: {"log": ["before"]}).add_node("note", note)
    inner = inner.add_edge(START, "before").add_edge("before", "note").compile()
    graph = StateGraph(State).add_node("first", lambda state: {"log": ["first"]}).add_node("inner", inner)
    return graph.add_edge(START, "first").add_edge("first", "inner").compile(checkpointer=saver)


def test_the_newest_checkpoint_is_kept_and_the_thread_goes_on(saver):
    graph, other = chain(saver), {"configurable": {"thread_id": "other"}}
    for config in (SHOP, SHOP, other):
        state = graph.invoke({"log": ["in"]}, config)
    untouched = list(saver.list(other))
    before, count = graph.get_state(SHOP), len(list(saver.list(SHOP)))
    assert purge_checkpoints(saver, "shop") == count - 1 > 5
    (kept,) = saver.list(SHOP)
    after = graph.get_state(SHOP)
    assert (after.values, after.next, after.config) == (before.values, before.next, before.config)
    assert kept.parent_config is None and not kept.pending_writes
    assert list(saver.list(other)) == untouched
    assert graph.invoke({"log": ["again"]}, SHOP)["log"][: len(before.values["log"])] == before.values["log"]
    assert graph.get_state(other).values == state
    assert purge_checkpoints(saver, "nobody") == 0


def test_a_subgraph_that_waits_goes_on_and_one_that_has_ended_goes(saver):
    graph = chain(saver, ask=True)
    graph.invoke({"log": ["secret"]}, SHOP)
    graph.invoke(Command(resume="yes"), SHOP)
    graph.invoke({"log": ["more"]}, SHOP)
    namespaces = {c.config["configurable"]["checkpoint_ns"] for c in saver.list(SHOP)}
    assert len(namespaces) == 3
    purge_checkpoints(saver, "shop")
    kept = [c.config["configurable"]["checkpoint_ns"] for c in saver.list(SHOP)]
    assert len(kept) == 2 and set(kept) < namespaces
    assert graph.get_state(SHOP).interrupts[0].value == "go on?"
    state = graph.invoke(Command(resume="sure"), SHOP)
    assert state["log"][-2:] == ["before", "inner sure"]
    assert purge_checkpoints(saver, "shop") > 0
    assert len(list(saver.list(SHOP))) == 1


def test_several_threads_at_once(saver):
    graph = chain(saver)
    for thread in ("a", "b", "c"):
        graph.invoke({"log": ["in"]}, {"configurable": {"thread_id": thread}})
    count = len(list(saver.list({"configurable": {"thread_id": "a"}})))
    assert purge_checkpoints(saver, "a", "b") == 2 * (count - 1)
    assert [len(list(saver.list({"configurable": {"thread_id": t}}))) for t in "abc"] == [1, 1, count]


@pytest.fixture
def redacting(new_session, get_price):
    def build(saver, *, name="", policies=None):
        session = new_session(name=name, policies=[SupersededToolResult()] if policies is None else policies)
        agent = create_agent(
            ChatKVRetract(session=session),
            [get_price],
            middleware=[KVRetractMiddleware(session, redact=True)],
            checkpointer=saver,
        )
        return agent, session

    return build


def without_the_answer(state):
    """The tool's answer as it was stored: the assistant's sentence repeats the price, and was not withdrawn."""
    return [m.text for m in state.values["messages"] if m.type == "tool"]


def test_in_memory_nothing_holds_the_result_any_more(redacting):
    saver = InMemorySaver()
    agent, _ = redacting(saver)
    for _ in range(2):
        agent.invoke(QUESTION, SHOP)
    assert f"content\\xa6{MARKER}" in everything(saver)
    purge_checkpoints(saver, "shop")
    assert f"content\\xa6{MARKER}" not in everything(saver)
    assert without_the_answer(agent.get_state(SHOP)) == ["[withdrawn]", "15 EUR"]


def stored_result(files):
    """Whether the tool's answer is anywhere in the bytes: msgpack writes its length before a text."""
    return [name for name, data in files.items() if b"content\xa6" + MARKER.encode() in data]


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_the_bytes_of_an_sqlite_file_are_gone(redacting, tmp_path, journal):
    path = tmp_path / "db" / "checkpoints.sqlite"
    path.parent.mkdir()
    with SqliteSaver.from_conn_string(str(path)) as saver:
        saver.setup()
        saver.conn.execute(f"PRAGMA journal_mode={journal}")
        saver.conn.execute("PRAGMA secure_delete=OFF")  # the default of SQLite, but not of every build
        agent, _ = redacting(saver)
        for _ in range(2):
            agent.invoke(QUESTION, SHOP)
        assert stored_result(bytes_of(path.parent))
        assert purge_checkpoints(saver, "shop") > 5
        assert not stored_result(bytes_of(path.parent)), "with the database still open"
    assert not stored_result(bytes_of(path.parent))
    with SqliteSaver.from_conn_string(str(path)) as saver:
        agent, session = redacting(saver, name="restarted", policies=[])
        with prefilled_texts(session) as texts:
            reply = agent.invoke(QUESTION, SHOP)["messages"][-1]
        assert reply.text == "Tea costs 19 EUR." and f"{MARKER}\n" not in "".join(texts)
        assert without_the_answer(agent.get_state(SHOP)) == ["[withdrawn]", "15 EUR", "19 EUR"]


async def test_the_asynchronous_twin(redacting, tmp_path):
    path = tmp_path / "db" / "checkpoints.sqlite"
    path.parent.mkdir()
    async with AsyncSqliteSaver.from_conn_string(str(path)) as saver:
        agent, _ = redacting(saver)
        for _ in range(2):
            await agent.ainvoke(QUESTION, SHOP)
        assert stored_result(bytes_of(path.parent))
        count = len([c async for c in saver.alist(SHOP)])
        assert await apurge_checkpoints(saver, "shop") == count - 1
        assert not stored_result(bytes_of(path.parent))
        reply = (await agent.ainvoke(QUESTION, SHOP))["messages"][-1]
    assert reply.text == "Tea costs 19 EUR."
    memory = InMemorySaver()
    await chain(memory).ainvoke({"log": ["in"]}, SHOP)
    assert await apurge_checkpoints(memory, "shop") > 0


def test_another_reader_of_the_file_is_told_of(tmp_path):
    path = str(tmp_path / "checkpoints.sqlite")
    with SqliteSaver.from_conn_string(path) as saver:
        graph = chain(saver)
        graph.invoke({"log": ["in"]}, SHOP)
        reader = sqlite3.connect(path)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM checkpoints").fetchone()
        saver.conn.execute("PRAGMA busy_timeout=50")
        with pytest.raises(sqlite3.OperationalError, match="log still holds them, since another connection reads"):
            purge_checkpoints(saver, "shop")
        reader.close()
        assert purge_checkpoints(saver, "shop") == 0, "they were deleted; now the log is emptied as well"
        assert graph.invoke({"log": ["again"]}, SHOP)


def test_channels_kept_by_their_differences_are_refused(saver):
    class Differences(TypedDict):
        log: Annotated[list, DeltaChannel(lambda old, writes: old + [x for w in writes for x in w])]

    graph = StateGraph(Differences).add_node("a", lambda state: {"log": ["a"]}).add_edge(START, "a")
    graph = graph.compile(checkpointer=saver)
    for _ in range(2):
        graph.invoke({"log": ["in"]}, SHOP)
    before = everything(saver)
    with pytest.raises(UnsupportedError, match=r"thread 'shop' keeps channels by their differences \(DeltaChannel\)"):
        purge_checkpoints(saver, "shop")
    assert everything(saver) == before
    assert graph.get_state(SHOP).values["log"] == ["in", "a", "in", "a"]


class KeepsLatest(InMemorySaver):
    """A checkpointer with a `prune` of its own, that keeps the newest checkpoint of each namespace."""

    def prune(self, thread_ids, *, strategy="keep_latest"):
        assert strategy == "keep_latest"
        for thread in thread_ids:
            for ns, found in self.storage[thread].items():
                self.storage[thread][ns] = {max(found): found[max(found)]}

    async def aprune(self, thread_ids, *, strategy="keep_latest"):
        self.prune(thread_ids, strategy=strategy)


async def test_a_checkpointer_that_prunes_does_so_itself():
    plain = StateGraph(MessagesState).add_node("a", lambda state: {}).add_edge(START, "a")
    for purge in (purge_checkpoints, apurge_checkpoints):
        saver = KeepsLatest()
        graph = plain.compile(checkpointer=saver)
        graph.invoke(QUESTION, SHOP)
        count = len(list(saver.list(SHOP)))
        done = purge(saver, "shop")
        assert (done if isinstance(done, int) else await done) == count - 1
    saver = KeepsLatest()
    chain(saver).invoke({"log": ["in"]}, SHOP)
    with pytest.raises(UnsupportedError, match="keeps checkpoints of 1 subgraphs of thread 'shop' that have ended"):
        purge_checkpoints(saver, "shop")


async def test_other_checkpointers_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(UnsupportedError, match="got BaseCheckpointSaver; delete older checkpoints in its own storage"):
        purge_checkpoints(BaseCheckpointSaver(), "shop")
    with SqliteSaver.from_conn_string(":memory:") as saver:
        with pytest.raises(UnsupportedError, match="got SqliteSaver"):
            await apurge_checkpoints(saver, "shop")
    async with aiosqlite.connect(":memory:") as connection:
        with pytest.raises(UnsupportedError, match=r"got AsyncSqliteSaver"):
            purge_checkpoints(AsyncSqliteSaver(connection), "shop")
