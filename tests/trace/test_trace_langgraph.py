"""Histories written by a real LangGraph graph, in every form in which its messages are serialised."""

import json

import pytest

from kv_retract.trace import TraceProblem, read_traces

pytest.importorskip("langgraph")

from langchain_core.load import dumpd  # noqa: E402
from langchain_core.messages import (  # noqa: E402
    AIMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
    message_to_dict,
)
from langgraph.checkpoint.memory import InMemorySaver  # noqa: E402
from langgraph.graph import END, START, MessagesState, StateGraph  # noqa: E402

FORMS = {
    "lc": dumpd,
    "dict": message_to_dict,
    "flat": lambda message: message.model_dump(),
    "openai": convert_to_openai_messages,
}


def agent(state):
    """Calls the tool after a question, answers after a result."""
    last = state["messages"][-1]
    if isinstance(last, HumanMessage):
        call = {"name": "lookup", "args": {"q": last.content}, "id": f"c{len(state['messages'])}"}
        blocks = [
            {"type": "text", "text": "looking"},
            {"type": "tool_use", "id": call["id"], "name": "lookup", "input": {}},
        ]
        return {"messages": [AIMessage(content=blocks, tool_calls=[call])]}
    return {"messages": [AIMessage(content=f"it is {last.content}")]}


def tools(state):
    call = state["messages"][-1].tool_calls[0]
    return {"messages": [ToolMessage(content=f"<{call['args']['q']}>", tool_call_id=call["id"], name="lookup")]}


@pytest.fixture(scope="module")
def graph():
    builder = StateGraph(MessagesState)
    builder.add_node("agent", agent)
    builder.add_node("tools", tools)
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", lambda s: "tools" if s["messages"][-1].tool_calls else END)
    builder.add_edge("tools", "agent")
    return builder.compile(checkpointer=InMemorySaver())


def run(graph, thread, *questions):
    config = {"configurable": {"thread_id": thread}}
    for question in questions:
        graph.invoke({"messages": [SystemMessage("rules"), HumanMessage(question)]}, config)
    return config


def snapshot_json(snapshot, form):
    return {
        "values": {"messages": [form(m) for m in snapshot.values.get("messages", ())]},
        "next": list(snapshot.next),
        "config": snapshot.config,
        "metadata": snapshot.metadata,
        "created_at": snapshot.created_at,
        "parent_config": snapshot.parent_config,
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_thread_without_forks_is_one_trace(graph, tmp_path, form, suffix):
    config = run(graph, f"plain-{form}{suffix}", "a", "b")
    history = [snapshot_json(s, FORMS[form]) for s in graph.get_state_history(config)]
    path = tmp_path / f"h{suffix}"
    path.write_text(json.dumps(history) if suffix == ".json" else "\n".join(map(json.dumps, history)))
    [trace] = read_traces(path)
    assert trace.trace_id == f"plain-{form}{suffix}" and trace.format == "langgraph" and trace.branches == ()
    assert [m.role for m in trace.messages] == ["system", "user", "assistant", "tool", "assistant"] * 2
    call = trace.messages[2].tool_calls[0]
    assert (call.name, json.loads(call.arguments)) == ("lookup", {"q": "a"})
    assert trace.messages[2].content == "looking"
    assert (trace.messages[3].tool_call_id, trace.messages[3].content) == (call.id, "<a>")
    assert trace.messages[-1].content == "it is <b>"


def test_forks_become_traces_that_share_a_prefix(graph, tmp_path):
    config = run(graph, "forked", "a", "b")
    history = list(graph.get_state_history(config))
    before_b = next(s for s in history if s.next == () and len(s.values["messages"]) == 5)
    graph.invoke({"messages": [HumanMessage("c")]}, before_b.config)
    lines = [json.dumps(snapshot_json(s, dumpd)) for s in graph.get_state_history(config)]
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(reversed(lines)))
    first, second = read_traces(path)
    assert {t.messages[-1].content for t in (first, second)} == {"it is <b>", "it is <c>"}
    assert first.trace_id != second.trace_id and first.trace_id.startswith("forked@")
    for trace, other in ((first, second), (second, first)):
        [branch] = trace.branches
        assert branch.trace_id == other.trace_id
        assert branch.shared_messages == 5
        assert trace.messages[:5] == other.messages[:5]
        assert trace.messages[5] != other.messages[5]


def test_several_threads_in_one_file(graph, tmp_path):
    lines = []
    for thread in ("one", "two"):
        lines += [snapshot_json(s, dumpd) for s in graph.get_state_history(run(graph, thread, "a"))]
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [t.trace_id for t in read_traces(path)] == ["one", "two"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "values.messages"),
        ([{"type": "remove", "content": ""}], "'remove'"),
        ([{"lc": 1, "id": [], "kwargs": {}}], "''"),
    ],
)
def test_malformed_snapshots_are_problems(tmp_path, messages, said):
    config = {"configurable": {"thread_id": "t", "checkpoint_id": "1"}}
    path = tmp_path / "h.json"
    path.write_text(json.dumps([{"values": {"messages": messages}, "config": config}]))
    [problem] = read_traces(path)
    assert isinstance(problem, TraceProblem) and said in problem.message


def test_snapshot_without_thread_id_is_a_problem(tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps({"values": {"messages": []}, "config": {}}))
    [problem] = read_traces(path)
    assert "thread_id" in problem.message


def test_invalid_tool_calls_and_reasoning_are_kept(tmp_path):
    message = AIMessage(
        content="x",
        additional_kwargs={"reasoning_content": "because"},
        invalid_tool_calls=[{"name": "f", "args": '{"a": ', "id": "c", "error": "cut", "type": "invalid_tool_call"}],
    )
    snapshot = {"values": {"messages": [dumpd(message)]}, "config": {"configurable": {"thread_id": "t"}}}
    path = tmp_path / "h.json"
    path.write_text(json.dumps(snapshot))
    [trace] = read_traces(path)
    assert trace.messages[0].reasoning == "because"
    assert trace.messages[0].tool_calls[0].arguments == '{"a": '
