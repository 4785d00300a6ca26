import json
from pathlib import Path

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies.base import POLICIES, PolicyContext
from kv_retract.policies.repeated_error import RepeatedError, signature
from kv_retract.testing.policies import PolicyConformance
from kv_retract.trace import Trace, read_traces
from kv_retract.types import Guarantee, Message, SpanRef, ToolCall

TAU_BENCH = Path(__file__).parents[3] / "shared" / "data" / "tau_bench" / "airline_trajectories.jsonl"
ANSWER = [Message("assistant", "hm")]


class TestRepeatedErrorConformance(PolicyConformance):
    tools = ("get_item", "run")
    results = ("a", "Error: x", "Error: 1", "Error: 2", '{"error": "x"}', "")

    @pytest.fixture(params=["newest", "first"])
    def policy(self, request):
        return RepeatedError(keep=request.param, alike="tool", include_call=True)

    @pytest.fixture
    def thread(self):
        calls = [Message("assistant", tool_calls=(ToolCall(f"c{n}", "run", "{}"),)) for n in range(2)]
        errors = [Message("tool", "Error: no such file", tool_call_id=f"c{n}") for n in range(2)]
        return [calls[0], errors[0], calls[1], errors[1], *ANSWER]


def test_all_but_the_newest_of_one_call_go(threads):
    t = threads
    fail = [t.call("book", text, "Error: full") for text in ('{"a": 1, "b": 2}', '{"b":2,"a":1}', {"a": 1, "b": 2})]
    assert t.proposed(RepeatedError(), t.ctx(fail[0])) == []
    assert t.proposed(RepeatedError(), t.ctx(*fail[:2])) == [1]
    assert t.proposed(RepeatedError(), t.ctx(*fail)) == [1, 3]
    assert t.proposed(RepeatedError(limit=2), t.ctx(*fail[:2])) == []
    assert t.proposed(RepeatedError(limit=2), t.ctx(*fail)) == [1, 3]
    [retraction, _] = RepeatedError().propose(t.ctx(*fail))
    assert retraction.reason == "book failed 3 times alike; the newest error says it"


def test_another_call_another_tool_or_another_error_is_not_alike(threads):
    t = threads
    first = t.call("book", {"a": 1}, "Error: full")
    for other in (
        t.call("book", {"a": 2}, "Error: full"),
        t.call("cancel", {"a": 1}, "Error: full"),
        t.call("book", {"a": 1}, "Error: unknown"),
        t.call("book", {"a": 1}, "done"),
    ):
        assert t.proposed(RepeatedError(), t.ctx(first, other)) == []


def test_alike_for_one_tool_whatever_the_arguments(threads):
    t = threads
    context = t.ctx(
        t.call("pay", {"amount": 255}, "Error: the total price is 305, but paid 255"),
        t.call("pay", {"amount": 300}, "Error: the total price is 305, but paid 300.50"),
        t.call("pay", {"card": "x"}, "Error: card x not found"),
        t.call("pay", {"card": "y"}, "Error: card y not found"),
    )
    assert t.proposed(RepeatedError(), context) == []
    assert t.proposed(RepeatedError(alike="tool"), context) == [1]


def test_successes_in_between_do_not_matter(threads):
    t = threads
    fail, done = t.call("run", {}, {"success": False}), t.call("run", {}, "done")
    assert t.proposed(RepeatedError(), t.ctx(fail, done, t.call("run", {}, {"success": False}))) == [1]


def test_the_first_is_kept_and_a_newer_goes_once_it_is_answered(threads):
    t = threads
    policy = RepeatedError(keep="first")
    context = t.ctx(t.call("run", {}, "Error: x"), t.call("run", {}, "Error: x"))
    assert t.proposed(policy, context) == [], "the model has not read the newest yet"
    assert t.proposed(policy, t.ctx(context.messages, ANSWER)) == [3]


def test_calls_go_too_where_asked(threads):
    t = threads
    context = t.ctx(t.call("run", {}, "Error: x"), t.call("run", {}, "Error: x"))
    spans = [r.span for r in RepeatedError(include_call=True).propose(context)]
    assert spans == [SpanRef(0, "tool_call", 0), SpanRef(1)]


def test_what_is_an_error_and_what_is_left_alone(threads):
    t = threads
    context = t.ctx(t.call("pay", {}, "Declined"), t.call("pay", {}, "Declined"))
    assert t.proposed(RepeatedError(), context) == []
    policy = POLICIES.create("repeated_error", error_pattern="Declined", guarantee="exact")
    assert [r.guarantee for r in policy.propose(context)] == [Guarantee.EXACT]
    assert t.proposed(RepeatedError(error_pattern="Declined", exclude=("p*",)), context) == []


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Error:  A b", "error: a\nB", True),
        ("at line 12, column 3", "at line 9, column 10", True),
        ("on 2024-05-20 at 10:30", "on 2024-05-21 at 9:05", True),
        ("flight HAT069 is full", "flight HAT083 is full", False),
        ("version 1.2", "version x", False),
        ("a" + " stack" * 200 + " KeyError", "a" + " stack" * 300 + " KeyError", True),
        ("a" + " stack" * 200 + " KeyError", "a" + " stack" * 200 + " TypeError", False),
    ],
)
def test_signatures(one, other, alike):
    assert (signature(one) == signature(other)) is alike


@pytest.mark.parametrize(
    "parameters", [{"limit": 0}, {"limit": 1.5}, {"limit": True}, {"alike": "arguments"}, {"keep": "last"}]
)
def test_parameters_that_are_none(parameters):
    with pytest.raises(PolicyError, match="expected"):
        RepeatedError(**parameters)


def test_malformed_pattern_is_named(threads):
    with pytest.raises(PolicyError, match=r"'\(unclosed'"):
        RepeatedError(error_pattern="(unclosed").propose(threads.ctx(threads.user("x")))


def test_in_tau_bench_what_goes_is_said_again_to_the_letter():
    if not TAU_BENCH.exists():
        pytest.skip("the public data set tau_bench/airline_trajectories.jsonl is not beside this checkout")
    found = 0
    for trace in read_traces(TAU_BENCH):
        assert isinstance(trace, Trace)
        messages = trace.messages
        for retraction in RepeatedError().propose(PolicyContext(thread_id=trace.trace_id, messages=messages)):
            at = retraction.span.message
            later = [
                m
                for call, m in zip(messages[at + 1 :], messages[at + 2 :], strict=False)
                if call.tool_calls
                and json.loads(call.tool_calls[0].arguments) == json.loads(messages[at - 1].tool_calls[0].arguments)
            ]
            assert any(m.content == messages[at].content for m in later)
            found += 1
    assert found == 4
