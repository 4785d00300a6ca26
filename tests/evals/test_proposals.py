from dataclasses import dataclass

import pytest

from kv_retract.errors import PolicyError
from kv_retract.evals.proposals import continuation_text, steps
from kv_retract.policies import Explicit, RetractionPolicy, ToolErrorRecovered
from kv_retract.trace import Trace
from kv_retract.types import Message, Retraction, SpanRef, ToolCall

CALL = (ToolCall("c", "f", '{"x": 1}'),)
MESSAGES = (
    Message("assistant", "Hello, how can I help?"),
    Message("user", "Find it."),
    Message("assistant", "", tool_calls=CALL),
    Message("tool", "Error: busy", tool_call_id="c", name="f"),
    Message("assistant", "", tool_calls=CALL),
    Message("tool", "found", tool_call_id="c", name="f"),
    Message("assistant", "Here."),
)
TRACE = Trace(trace_id="t", messages=MESSAGES, source="t:1", format="openai")


def test_a_step_is_the_moment_before_an_assistant_message():
    found = list(steps(TRACE, [ToolErrorRecovered()]))
    assert [(step.index, step.previous) for step in found] == [(2, 0), (4, 2), (6, 4)]
    assert [[p.span.message for p in step.proposals] for step in found] == [[], [], [3]]


@dataclass(kw_only=True)
class Looks(RetractionPolicy):
    """Proposes the newest message and remembers what it was shown."""

    name = "looks"
    error: type[Exception] | None = None

    def __post_init__(self):
        self.seen = []

    def propose(self, ctx):
        if self.error:
            raise self.error("broken")
        self.seen.append((ctx.thread_id, tuple(ctx.messages)))
        return [Retraction(span=SpanRef(len(ctx.messages) - 1), policy=self.name, reason="newest")]


def test_policies_see_the_past_only_and_all_are_asked_in_order():
    looks = Looks()
    found = list(steps(TRACE, [looks, ToolErrorRecovered()]))
    assert looks.seen == [("t", MESSAGES[:i]) for i in (2, 4, 6)]
    assert [(p.policy, p.span.message) for p in found[-1].proposals] == [("looks", 5), ("tool_error", 3)]


def test_what_the_caller_names_may_still_come():
    found = list(steps(TRACE, [Explicit(match="found")]))
    assert [[p.span.message for p in step.proposals] for step in found] == [[], [], [5]]


def test_a_policy_that_fails_is_named():
    with pytest.raises(PolicyError, match=r"policy 'looks' failed on thread 't' \(2 messages\): KeyError: 'broken'"):
        list(steps(TRACE, [Looks(error=KeyError)]))


def test_text_of_a_continuation():
    assert continuation_text(MESSAGES[-1]) == "Here."
    assert continuation_text(MESSAGES[2]) == 'f {"x": 1}'
    assert continuation_text(Message("assistant")) == ""
