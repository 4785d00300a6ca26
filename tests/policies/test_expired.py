from datetime import UTC, datetime, timedelta

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies.base import POLICIES, PolicyContext
from kv_retract.policies.expired import TIME_KEYS, Expired, newest_time
from kv_retract.testing.policies import PolicyConformance
from kv_retract.types import Guarantee, Message, ToolCall

NOW = datetime(2024, 5, 20, 12, 0, tzinfo=UTC)


class TestExpiredConformance(PolicyConformance):
    results = ('{"timestamp": 1716200000}', '{"as_of": "2024-05-20T10:00:00Z"}', '{"as_of": 1e999}', "a", "Error: x")

    @pytest.fixture
    def policy(self):
        return Expired(steps={"get_*": 2, "*": 5}, seconds={"*": 60})

    @pytest.fixture
    def thread(self):
        call = Message("assistant", tool_calls=(ToolCall("c", "get_item", "{}"),))
        return [call, Message("tool", "a", tool_call_id="c"), *[Message("assistant", "hm")] * 3]


class TestExpiredAtATime(TestExpiredConformance):
    """The same suite where the moment of the step is known."""

    def propose(self, policy, messages, records=()):
        return policy.propose(PolicyContext(thread_id="t", messages=messages, records=records, now=NOW))


def at(context, now=NOW):
    return PolicyContext(thread_id="t", messages=context.messages, now=now)


def test_a_result_goes_when_more_answers_followed_than_its_tool_allows(threads):
    t = threads
    weather = t.call("get_weather", {"city": "Oslo"}, {"degrees": 10})
    other = t.call("get_time_zone", {"city": "Oslo"}, "CET")
    policy = Expired(steps={"get_w*": 2})
    assert t.proposed(policy, t.ctx(weather, other, t.user("well?"), other)) == []
    [retraction] = policy.propose(t.ctx(weather, other, other, t.user("well?"), other))
    assert retraction.span.message == 1 and retraction.reason == "results of get_weather hold for 2 steps"


def test_answers_count_and_other_messages_do_not(threads):
    t = threads
    calls = (ToolCall("a", "get_x", "{}"), ToolCall("b", "get_x", "{}"))
    results = [Message("tool", "1", tool_call_id="a"), Message("tool", "2", tool_call_id="b")]
    context = t.ctx([Message("assistant", tool_calls=calls)], results, t.user("hm"), [Message("assistant", "yes")])
    assert t.proposed(Expired(steps={"*": 1}), context) == []
    assert t.proposed(Expired(steps={"*": 1}), t.ctx(context.messages, [Message("assistant", "no")])) == [1, 2]


def test_the_first_glob_that_matches_counts(threads):
    t = threads
    context = t.ctx(t.call("get_map", {}, "m"), t.call("get_price", {}, "p"), [Message("assistant", "x")] * 3)
    assert t.proposed(Expired(steps={"get_map": 100, "get_*": 2}), context) == [3]
    assert t.proposed(Expired(steps={"get_*": 2, "get_map": 100}), context) == [1, 3]


def test_seconds_by_the_time_in_the_result(threads):
    t = threads
    context = t.ctx(
        t.call("get_quote", {"n": 1}, {"price": 5, "as_of": "2024-05-20T11:00:00Z"}),
        t.call("get_quote", {"n": 2}, {"price": 6, "meta": [{"as_of": "2024-05-20T13:59:30+02:00"}]}),
        t.call("get_quote", {"n": 3}, {"price": 7}),
        t.call("get_quote", {"n": 4}, "as_of 2024-05-20T11:00:00Z"),
    )
    policy = Expired(seconds={"get_*": 60})
    [retraction] = policy.propose(at(context))
    assert retraction.span.message == 1 and retraction.reason == "results of get_quote hold for 60 seconds"
    assert t.proposed(policy, at(context, NOW + timedelta(minutes=1))) == [1, 3]
    assert t.proposed(policy, at(context, NOW.replace(tzinfo=None))) == [1], "a time without an offset is UTC"
    assert t.proposed(policy, at(context, NOW - timedelta(days=9))) == [], "a time to come is not old"


def test_without_a_moment_seconds_do_nothing(threads):
    t = threads
    context = t.ctx(t.call("get_quote", {}, {"timestamp": 0}))
    assert t.proposed(Expired(seconds={"*": 1}), context) == []
    assert t.proposed(Expired(seconds={"*": 1}), at(context)) == [1]


def test_either_limit_is_enough(threads):
    t = threads
    context = t.ctx(t.call("get_quote", {}, {"timestamp": NOW.timestamp()}), [Message("assistant", "x")] * 2)
    assert t.proposed(Expired(steps={"*": 1}, seconds={"*": 60}), at(context)) == [1]
    assert t.proposed(Expired(steps={"*": 9}, seconds={"*": 60}), at(context)) == []


@pytest.mark.parametrize(
    ("content", "time"),
    [
        ('{"timestamp": 1716206400}', NOW),
        ('{"timestamp": 1716206400.0}', NOW),
        ('{"timestamp": 1716206400000}', NOW),
        ('{"fetchedAt": "2024-05-20T12:00:00"}', NOW),
        ('[{"quoted_at": "2024-05-20 12:00"}, {"as_of": "2024-05-19T12:00Z"}]', NOW),
        ('{"as_of": "2024-05-20"}', None),
        ('{"as_of": "noon: the 20th"}', None),
        ('{"as_of": true}', None),
        ('{"as_of": null}', None),
        ('{"as_of": 1e300}', None),
        ('{"as_of": NaN}', None),
        ('{"created_at": "2024-05-20T12:00:00Z"}', None),
        ('{"as_of": ', None),
        ("1716206400", None),
        ("", None),
    ],
)
def test_the_newest_time(content, time):
    assert newest_time(content, TIME_KEYS) == time


def test_other_names_for_the_time(threads):
    context = threads.ctx(threads.call("get_quote", {}, {"stand": "2024-05-20T11:00:00Z"}))
    assert threads.proposed(Expired(seconds={"*": 60}, time_keys=("stan?",)), at(context)) == [1]


def test_guarantee(threads):
    policy = POLICIES.create("expired", steps={"*": 1}, guarantee="exact")
    context = threads.ctx(threads.call("get_x", {}, "a"), [Message("assistant", "x")] * 2)
    assert [r.guarantee for r in policy.propose(context)] == [Guarantee.EXACT]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "no limit"),
        ({"steps": {"get_*": 0}}, "steps of 'get_\\*'"),
        ({"seconds": {"*": -1.0}}, "positive number as seconds"),
        ({"seconds": {"*": float("nan")}}, "positive number"),
        ({"steps": {"*": "9"}}, "got '9'"),
        ({"steps": {"*": True}}, "got True"),
    ],
)
def test_limits_that_are_none(parameters, message):
    with pytest.raises(PolicyError, match=message):
        Expired(**parameters)
