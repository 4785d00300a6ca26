"""Whatever a file holds: traces, problems, or a TraceError; nothing else may come out."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_retract.errors import TraceError
from kv_retract.trace import Trace, TraceProblem, read_traces

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"},
    {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
]
LC = {
    "lc": 1,
    "type": "constructor",
    "id": ["langchain", "AIMessage"],
    "kwargs": {"content": "x", "tool_calls": [CALL]},
}
AI = {
    "type": "ai",
    "data": {"content": [{"type": "thinking"}, "y"], "tool_calls": [{"name": "f", "args": {}, "id": "a"}]},
}
SNAPSHOT = {
    "values": {"messages": [LC, AI, {"type": "human", "content": "q"}]},
    "config": {"configurable": {"thread_id": "t", "checkpoint_id": "2", "checkpoint_ns": ""}},
    "parent_config": {"configurable": {"thread_id": "t", "checkpoint_id": "1"}},
}
TRAJECTORY = {
    "environment": "main",
    "history": [
        {"role": "assistant", "content": "t", "thought": "t", "action": "ls"},
        {"role": "user", "content": "a.py"},
    ],
}
SEEDS = [
    CHAT,
    {"messages": CHAT, "id": "x", "tools": []},
    {"traj": CHAT, "task_id": 1, "trial": 0},
    [SNAPSHOT],
    TRAJECTORY,
]

junk = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just([]), st.just({}), st.just([[]]))


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def damaged(draw):
    """A valid file with some of its values replaced or removed."""
    value = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(value) if p] or [()]))
        if not path:
            break
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = copy.deepcopy(draw(junk))
        else:
            del parent[path[-1]]
    return value


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=damaged(), suffix=st.sampled_from([".json", ".jsonl", ".traj"]))
def test_damaged_files_never_crash_the_reader(tmp_path, value, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_text(json.dumps(value))
    try:
        found = list(read_traces(path))
    except TraceError as error:
        assert path.name in str(error)
        return
    for item in found:
        assert str(path) in item.source
        if isinstance(item, Trace):
            assert item.messages and isinstance(item.trace_id, str)
            assert all(isinstance(m.content, str) for m in item.messages)
        else:
            assert isinstance(item, TraceProblem) and item.message


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_undamaged_seeds_are_read(tmp_path, number):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(SEEDS[number]))
    [trace] = read_traces(path)
    assert isinstance(trace, Trace) and trace.messages
