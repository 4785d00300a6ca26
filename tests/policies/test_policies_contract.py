"""What holds for every built-in policy."""

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.policies import POLICIES, Explicit, PolicyContext, SupersededToolResult, ToolErrorRecovered
from kv_retract.types import Message, ToolCall

BUILT_IN = [SupersededToolResult(), ToolErrorRecovered(include_call=True)]

tools = st.sampled_from(["get_item", "update_item", "open", "edit", "run"])
arguments = st.sampled_from(['{"item_id": 1}', '{"item_id": 2}', '{"path": "a"}', "{broken", "[]", ""])
results = st.sampled_from(["a", "b", "Error: x", '{"error": "x"}', ""])
ids = st.sampled_from(["c1", "c2", "c3"])


@st.composite
def messages(draw):
    """Threads as models write them: ids used twice, orphaned results, dangling calls."""
    out = []
    for kind in draw(st.lists(st.sampled_from(["user", "call", "result", "pair"]), max_size=25)):
        id = draw(ids)
        if kind == "user":
            out.append(Message(role="user", content="hello"))
        if kind in ("call", "pair"):
            out.append(Message(role="assistant", tool_calls=(ToolCall(id, draw(tools), draw(arguments)),)))
        if kind in ("result", "pair"):
            out.append(Message(role="tool", content=draw(results), tool_call_id=draw(st.sampled_from([id, None]))))
    return out


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda p: p.name)
@given(thread=messages())
def test_proposals_are_deterministic_unique_and_inside_of_the_thread(policy, thread):
    before = list(thread)
    first = policy.propose(PolicyContext(thread_id="t", messages=thread))
    assert first == policy.propose(PolicyContext(thread_id="t", messages=thread))
    assert thread == before
    spans = [r.span for r in first]
    assert len(set(spans)) == len(spans)
    for retraction in first:
        message = thread[retraction.span.message]
        assert message.role == ("tool" if retraction.span.part == "content" else "assistant")
        assert retraction.policy == policy.name and retraction.reason


@pytest.mark.parametrize("policy", BUILT_IN, ids=lambda p: p.name)
@given(thread=messages(), more=messages())
def test_what_was_proposed_stays_proposed(policy, thread, more):
    """Policies only look back, so a longer thread never takes a proposal away."""
    short = policy.propose(PolicyContext(thread_id="t", messages=thread))
    long = policy.propose(PolicyContext(thread_id="t", messages=[*thread, Message(role="user", content="."), *more]))
    assert {r.span for r in short} <= {r.span for r in long}


@pytest.mark.parametrize("policy", [*BUILT_IN, Explicit(match="a value")], ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["one entity", "many entities", "nothing written", "one big message"])
def test_two_thousand_messages_take_milliseconds(policy, kind):
    thread = []
    for i in range(1000):
        entity = 1 if kind == "one entity" else i
        tool = "update_item" if i % 3 == 0 and kind != "nothing written" else "get_item"
        call = ToolCall(f"c{i}", tool, f'{{"item_id": {entity}, "user_id": "U"}}')
        thread.append(Message(role="assistant", tool_calls=(call,)))
        thread.append(Message(role="tool", content=f"a value {i}", tool_call_id=f"c{i}", name=tool))
    if kind == "one big message":
        calls = tuple(call for message in thread[::2] for call in message.tool_calls)
        thread = [Message(role="assistant", tool_calls=calls), *thread[1::2]]
    context = PolicyContext(thread_id="t", messages=thread)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        policy.propose(context)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.05


def test_built_in_policies_are_registered_without_torch():
    code = (
        "import sys; from kv_retract.policies import POLICIES as P; print(','.join(P.names()), 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"explicit", "superseded", "tool_error"} <= set(printed[0].split(","))
    assert printed[1] == "False"


def test_factories_carry_their_names():
    for name in ("explicit", "superseded", "tool_error"):
        assert POLICIES.factory(name).name == name
