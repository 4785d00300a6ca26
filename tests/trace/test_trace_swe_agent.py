import json

import pytest

from kv_retract.policies import PolicyContext, SupersededToolResult, ToolErrorRecovered
from kv_retract.trace import TraceProblem, read_traces

OPEN = "[File: /repo/{0} (2 lines total)]\n1:x\n(Open file: /repo/{0})\n(Current directory: /repo)\nbash-$"


def entry(role, content, **fields):
    return {"role": role, "content": content, **fields}


def action(command, observation, role="user", thought="now"):
    return [entry("assistant", f"{thought} {command}", action=command, thought=thought), entry(role, observation)]


def read(tmp_path, history, **fields):
    path = tmp_path / "run.traj"
    path.write_text(json.dumps({"history": history, **fields}))
    [found] = read_traces(path)
    return found


def calls(trace):
    return [(c.name, json.loads(c.arguments).get("path")) for m in trace.messages for c in m.tool_calls]


def test_actions_become_calls_and_observations_their_results(tmp_path):
    history = [
        entry("system", "rules"),
        entry("user", "a demonstration", is_demo=True),
        entry("user", "fix it"),
        *action("open a.py 12\n", OPEN.format("a.py"), role="tool", thought="look"),
    ]
    trace = read(tmp_path, history)
    assert trace.trace_id == "run" and trace.format == "swe_agent"
    assert [m.role for m in trace.messages] == ["system", "user", "assistant", "tool"]
    asked, answered = trace.messages[2:]
    assert asked.content == "look"
    assert json.loads(asked.tool_calls[0].arguments) == {"command": "open a.py 12", "path": "/repo/a.py"}
    assert (answered.tool_call_id, answered.name) == (asked.tool_calls[0].id, "open")


def test_path_of_a_command(tmp_path):
    history = [
        *action("ls", "a.py\n(Open file: n/a)\n(Current directory: /repo)\nbash-$"),
        *action('open "b.py"', "no footer"),
        *action("edit 1:1\nx\nend_of_edit", "no footer either"),
        *action("create c.py", OPEN.format("c.py")),
        *action("scroll_down", "no footer"),
        *action("python c.py", OPEN.format("c.py")),
    ]
    assert calls(read(tmp_path, history)) == [
        ("ls", None),
        ("open", "b.py"),
        ("edit", None),
        ("create", "/repo/c.py"),
        ("scroll_down", "/repo/c.py"),
        ("python", None),
    ]


def test_answers_without_action_and_actions_without_answer(tmp_path):
    history = [
        entry("assistant", "thinking aloud"),
        entry("user", "please act"),
        entry("assistant", "first", action="ls", thought="first"),
        entry("assistant", "second", action="submit", thought="second"),
    ]
    trace = read(tmp_path, history)
    assert [(m.role, m.content, len(m.tool_calls)) for m in trace.messages] == [
        ("assistant", "thinking aloud", 0),
        ("user", "please act", 0),
        ("assistant", "first", 1),
        ("assistant", "second", 1),
    ]
    assert len({c.id for m in trace.messages for c in m.tool_calls}) == 2


def test_policies_see_views_and_failed_edits(tmp_path):
    failed = "Your proposed edit has introduced new syntax error(s).\n(Open file: /repo/a.py)"
    history = [
        *action("open a.py", OPEN.format("a.py")),
        *action("open b.py", OPEN.format("b.py")),
        *action("open a.py", OPEN.format("a.py")),
        *action("edit 1:1\ny\nend_of_edit", failed),
        *action("edit 1:1\nz\nend_of_edit", "File updated.\n(Open file: /repo/a.py)"),
    ]
    context = PolicyContext(thread_id="t", messages=read(tmp_path, history).messages)
    assert [r.span.message for r in SupersededToolResult().propose(context)] == [1, 5]
    assert [r.span.message for r in ToolErrorRecovered().propose(context)] == [7]


@pytest.mark.parametrize("history", [[], [3], [{"content": "x"}], [{"role": "user", "content": 5}], [{"role": "x"}]])
def test_malformed_history_is_a_problem(tmp_path, history):
    found = read(tmp_path, history)
    assert isinstance(found, TraceProblem) and "expected" in found.message
