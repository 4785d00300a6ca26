"""Which reader a file goes to, and what becomes of what cannot be read."""

import json

import pytest

from kv_retract.errors import TraceError
from kv_retract.trace import Trace, TraceProblem, read_traces

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def texts(trace):
    return [message.content for message in trace.messages]


def test_lines_of_both_openai_forms(tmp_path):
    lines = [
        CHAT,
        {"messages": CHAT, "id": "a", "tools": [{"type": "function"}]},
        {"traj": CHAT, "task_id": 3, "trial": 1},
    ]
    path = write(tmp_path / "t.jsonl", "\n".join(json.dumps(line) for line in lines))
    traces = list(read_traces(path))
    assert [t.trace_id for t in traces] == ["t-1", "a", "task-3-trial-1"]
    assert [t.source for t in traces] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert all(texts(t) == ["hi", "hello"] and t.format == "openai" for t in traces)
    assert traces[1].tools == ({"type": "function"},)


BAD_LINES = [
    b'{"messages": [',
    b"not json",
    b'{"messages": "text"}',
    b'{"messages": []}',
    b'{"messages": [{"role": "wizard", "content": "x"}]}',
    b'{"messages": [3]}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}',
    b'{"messages": [{"role": "assistant", "tool_calls": 5}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b"\xff\xfe",
    b"[" * 100_000,
    b"{}",
    b"null",
]


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_malformed_line_is_named_and_the_others_go_on(tmp_path, bad):
    good = json.dumps(CHAT).encode()
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join([good, bad, b"", good]))
    first, problem, last = read_traces(path)
    assert isinstance(first, Trace) and isinstance(last, Trace)
    assert isinstance(problem, TraceProblem)
    assert problem.source == f"{path}:2" and "expected" in problem.message or "message 0" in problem.message
    assert last.source == f"{path}:4"


@pytest.mark.parametrize(
    ("name", "text", "sources"),
    [
        ("one.json", json.dumps(CHAT, indent=1), [""]),
        ("two.json", json.dumps([CHAT, CHAT], indent=1), ["[0]", "[1]"]),
        ("objects.json", json.dumps([{"messages": CHAT}]), ["[0]"]),
        ("lines.json", json.dumps(CHAT) + "\n" + json.dumps(CHAT), [":1", ":2"]),
        ("bom.jsonl", "\ufeff" + json.dumps(CHAT), [":1"]),
    ],
)
def test_shapes_of_json_files(tmp_path, name, text, sources):
    path = write(tmp_path / name, text)
    traces = list(read_traces(path))
    assert [t.source for t in traces] == [f"{path}{s}" for s in sources]
    assert all(texts(t) == ["hi", "hello"] for t in traces)
    assert len({t.trace_id for t in traces}) == len(traces)


def test_item_of_a_list_that_is_no_trace_is_a_problem(tmp_path):
    path = write(tmp_path / "t.json", json.dumps([CHAT, {"a": 1}, CHAT]))
    found = list(read_traces(path))
    assert [type(f) for f in found] == [Trace, TraceProblem, Trace]
    assert found[1].source == f"{path}[1]"


def test_broken_json_file_is_one_problem(tmp_path):
    path = write(tmp_path / "t.json", json.dumps(CHAT, indent=1)[:-2])
    [problem] = read_traces(path)
    assert problem.source == str(path) and "JSON" in problem.message


def test_folder_reads_all_known_files_in_order(tmp_path):
    write(tmp_path / "README.md", "no trace")
    write(tmp_path / "b.jsonl", json.dumps(CHAT))
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "x.json", json.dumps({"messages": CHAT}))
    write(tmp_path / "c.json", '{"unrelated": 1}')
    found = list(read_traces(tmp_path))
    assert [type(f) for f in found] == [Trace, Trace, TraceProblem]
    assert found[2].source == str(tmp_path / "c.json") and "unrelated" in found[2].message


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "empty.jsonl", "empty_list.json", "prose.txt", "binary.txt", "other.json"]
)
def test_files_without_traces_raise(tmp_path, name):
    contents = {
        "empty.jsonl": b"\n",
        "empty_list.json": b"[]",
        "prose.txt": b"once upon a time",
        "binary.txt": b"\xff\x00",
        "other.json": b'{"a": 1}',
    }
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    with pytest.raises(TraceError, match=name):
        list(read_traces(tmp_path / name))


def test_folder_without_known_files_raises(tmp_path):
    with pytest.raises(TraceError, match=".jsonl"):
        list(read_traces(tmp_path))


def test_spellings_of_chat_messages(tmp_path):
    messages = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "content": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": "f", "args": {"x": 1}}]},
        {"role": "tool", "content": "one"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "function_call": {"name": "g", "arguments": "{}"},
        },
        {"role": "function", "name": "g", "content": "two"},
        {"role": "assistant", "tool_calls": [{"id": "c9", "function": {"name": "h", "arguments": '{"y": 2}'}}]},
    ]
    [trace] = read_traces(write(tmp_path / "t.jsonl", json.dumps(messages)))
    system, user, first, one, second, two, dangling = trace.messages
    assert (system.role, user.content) == ("system", "ab")
    assert (
        first.content == ""
        and first.tool_calls[0].name == "f"
        and json.loads(first.tool_calls[0].arguments) == {"x": 1}
    )
    assert one.tool_call_id == "c1"
    assert second.reasoning == "hm" and two.role == "tool" and two.tool_call_id == second.tool_calls[0].id
    assert dangling.tool_calls[0].arguments == '{"y": 2}'


def test_results_without_ids_answer_calls_in_order(tmp_path):
    calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ("a", "b")]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "orphan"},
    ]
    [trace] = read_traces(write(tmp_path / "t.jsonl", json.dumps(messages)))
    assert [m.tool_call_id for m in trace.messages[1:]] == ["a", "b", "call_3"]
