"""Wrappers over stub policies that propose what they are told."""

import time
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from kv_retract.errors import PolicyError
from kv_retract.policies import (
    POLICIES,
    Explicit,
    PolicyContext,
    RetractionPolicy,
    SupersededToolResult,
    ToolErrorRecovered,
)
from kv_retract.policies.composed import AllOf, AnyOf, Cooldown, MinConfidence
from kv_retract.testing.policies import PolicyConformance, recorded
from kv_retract.types import Guarantee, Message, Retraction, Scope, SpanRef, ToolCall

ROLES = ("user", "assistant")
THREAD = tuple(Message(ROLES[i % 2], f"message number {i}") for i in range(10))


@dataclass(kw_only=True)
class Says(RetractionPolicy):
    """Proposes the given spans."""

    name: ClassVar[str] = "says"
    spans: tuple = ()
    guarantee: Guarantee = Guarantee.STEERED
    confidence: float = 1.0
    reason: str = "told so"

    def propose(self, ctx):
        return [
            Retraction(
                span=span, policy=self.name, reason=self.reason, guarantee=self.guarantee, confidence=self.confidence
            )
            for span in self.spans
        ]


@dataclass(kw_only=True)
class AlsoSays(Says):
    name: ClassVar[str] = "also_says"


def at(*messages):
    return tuple(SpanRef(message) for message in messages)


def ranges(*pairs):
    return tuple(SpanRef(0, start=start, end=end) for start, end in pairs)


def proposed(policy, messages=THREAD, records=()):
    return policy.propose(PolicyContext(thread_id="t", messages=messages, records=records))


def spans(policy, messages=THREAD, records=()):
    return tuple(r.span for r in proposed(policy, messages, records))


# -- any_of and all_of ------------------------------------------------------------------------------------------------


def test_any_of_joins_and_names_who_found_it():
    policy = AnyOf(policies=[Says(spans=at(1, 2)), AlsoSays(spans=at(2, 3))])
    assert [(r.span.message, r.policy) for r in proposed(policy)] == [(1, "says"), (2, "says"), (3, "also_says")]


def test_any_of_takes_the_strongest_guarantee_and_the_highest_confidence_of_a_span():
    weak = Says(spans=at(2), confidence=0.9)
    strong = AlsoSays(spans=at(2), guarantee=Guarantee.EXACT, confidence=0.4)
    for policies in ([weak, strong], [strong, weak]):
        [retraction] = proposed(AnyOf(policies=policies))
        assert retraction == Retraction(
            span=SpanRef(2), policy="also_says", reason="told so", guarantee=Guarantee.EXACT, confidence=0.9
        )


def test_any_of_leaves_spans_apart_that_only_overlap():
    assert len(spans(AnyOf(policies=[Says(spans=ranges((0, 5))), AlsoSays(spans=ranges((3, 8)))]))) == 2


def test_all_of_proposes_the_first_ones_span_where_all_overlap():
    first = Says(spans=ranges((0, 4), (6, 10)), confidence=0.9)
    second = AlsoSays(spans=ranges((2, 5), (3, 4)), guarantee=Guarantee.EXACT, confidence=0.5)
    assert proposed(AllOf(policies=[first, second])) == [
        replace(proposed(first)[0], guarantee=Guarantee.EXACT, confidence=0.5)
    ]


def test_all_of_needs_every_policy():
    policies = [Says(spans=at(1, 2, 3)), AlsoSays(spans=at(2, 3)), Says(spans=at(3, 4))]
    assert spans(AllOf(policies=policies)) == at(3)
    assert spans(AllOf(policies=[*policies, AlsoSays()])) == ()
    assert spans(AllOf(policies=policies[:1])) == at(1, 2, 3)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0, 4), (4, 8), False),
        ((0, 4), (3, 8), True),
        ((2, 3), (0, 8), True),
        ((0, 8), (2, 3), True),
        ((0, None), (15, 16), True),
        ((3, 3), (0, 8), False),
        ((3, 3), (3, 3), True),
    ],
)
def test_half_open_ranges_overlap_where_they_share_a_character(one, other, overlap):
    policies = [Says(spans=ranges(one)), AlsoSays(spans=ranges(other))]
    assert bool(spans(AllOf(policies=policies))) is overlap
    assert bool(spans(AllOf(policies=policies[::-1]))) is overlap


def test_an_enclosing_span_is_found_behind_many_short_ones():
    enclosing = AlsoSays(spans=ranges((0, 16), *((i, i + 1) for i in range(12))))
    assert spans(AllOf(policies=[Says(spans=ranges((14, 15))), enclosing])) == ranges((14, 15))


def test_contents_and_calls_of_one_message_do_not_overlap():
    message = Message("assistant", "text", (ToolCall("a", "f", "{}"), ToolCall("b", "g", "{}")))
    parts = [SpanRef(0), SpanRef(0, "tool_call", 0), SpanRef(0, "tool_call", 1)]
    for one in parts:
        for other in parts:
            policy = AllOf(policies=[Says(spans=(one,)), AlsoSays(spans=(other,))])
            assert bool(spans(policy, [message])) is (one == other)


def test_many_spans_in_one_message_are_compared_in_milliseconds():
    many = ranges(*((i, i + 1) for i in range(5_000)))
    policy = AllOf(policies=[Says(spans=many), AlsoSays(spans=many)])
    begin = time.perf_counter()
    assert len(spans(policy, [Message("user", "x" * 5_000)])) == 5_000
    assert time.perf_counter() - begin < 1


# -- min_confidence and cooldown --------------------------------------------------------------------------------------


def test_min_confidence_includes_the_threshold():
    inner = AnyOf(policies=[Says(spans=at(1), confidence=0.5), AlsoSays(spans=at(2), confidence=0.49)])
    assert spans(MinConfidence(policy=inner, at_least=0.5)) == at(1)


def branch(retraction, newest, number=0):
    """The record of a retraction that was made when `newest` was the last message."""
    return replace(recorded(retraction, number), window_size=newest - retraction.span.message + 1)


def test_cooldown_lets_the_first_pass_and_the_rest_when_the_steps_are_over():
    inner = Says(spans=at(0, 2, 4))
    policy = Cooldown(policy=inner, most=1, steps=2)
    short = THREAD[:5]  # messages 0 to 4: assistants 1 and 3 have spoken
    assert spans(policy, short) == at(0)
    record = branch(proposed(inner)[0], newest=4)
    assert spans(policy, short, [record]) == at(0), "a retry proposes the same"
    assert spans(policy, THREAD[:7], [record]) == at(0), "one step later it is too early"
    assert spans(policy, THREAD[:9], [record]) == at(0, 2), "two steps later there is room again"


def test_cooldown_counts_per_steps_and_not_per_message():
    inner = Says(spans=at(0, 2, 4))
    assert spans(Cooldown(policy=inner, most=2, steps=1), THREAD) == at(0, 2)
    record = branch(proposed(inner)[0], newest=8)
    assert spans(Cooldown(policy=inner, most=2, steps=1), THREAD[:9], [record]) == at(0, 2)
    assert spans(Cooldown(policy=inner, most=1, steps=1), THREAD, [record]) == at(0, 2), "an assistant spoke since"


def test_cooldown_ignores_records_of_other_policies_and_sees_through_wrappers():
    inner = MinConfidence(policy=AnyOf(policies=[Says(spans=at(0)), AlsoSays(spans=at(2))]), at_least=0)
    policy = Cooldown(policy=inner, most=1, steps=5)
    assert policy.finders() == {"says", "also_says"}
    [other] = [branch(r, newest=9) for r in proposed(Explicit(spans=[SpanRef(4)]))]
    assert spans(policy, THREAD, [other]) == at(0)
    assert spans(policy, THREAD, [replace(other, policy="also_says")]) == ()


def test_cooldown_dates_a_record_of_a_thread_by_its_message():
    record = replace(recorded(proposed(Says(spans=at(8)))[0], 0), scope=Scope.THREAD, window_size=1)
    assert spans(Cooldown(policy=Says(spans=at(0)), most=1, steps=2), THREAD, [record]) == ()
    old = replace(record, span=SpanRef(2))
    assert spans(Cooldown(policy=Says(spans=at(0)), most=1, steps=2), THREAD, [old]) == at(0)


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("any_of", {"policies": []}, "no inner policies"),
        ("all_of", {"policies": ["nope"]}, r"policies\[0\]: unknown policy 'nope'"),
        ("min_confidence", {"policy": "tool_error", "at_least": 1.5}, "at_least from 0 to 1, got 1.5"),
        ("cooldown", {"policy": "tool_error", "most": 0, "steps": 3}, "at least 1, got most=0, steps=3"),
        ("cooldown", {"policy": 3, "most": 1, "steps": 3}, "expected a policy, its name"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(PolicyError, match=message):
        POLICIES.create(name, **parameters)


def calls(*parts):
    thread = []
    for number, (tool, arguments, result) in enumerate(parts):
        thread.append(Message("assistant", tool_calls=(ToolCall(f"c{number}", tool, arguments),)))
        thread.append(Message("tool", result, tool_call_id=f"c{number}"))
    return thread


class OfWrappers(PolicyConformance):
    """A wrapper's proposals carry the names of the policies that it asks."""

    time_limit = 0.15  # of the policies that it asks, together

    def check(self, policy, messages, proposals):
        assert {r.policy for r in proposals} <= policy.finders()
        super().check(policy, messages, [replace(r, policy=policy.name) for r in proposals])

    @pytest.fixture
    def thread(self):
        return calls(("run", "{}", "Error: no such file"), ("run", "{}", "done"))


BOTH = (ToolErrorRecovered(), {"name": "superseded", "until_read": []})


class TestAnyOf(OfWrappers):
    @pytest.fixture
    def policy(self):
        return AnyOf(policies=BOTH)


class TestAllOf(OfWrappers):
    @pytest.fixture
    def policy(self):
        return AllOf(policies=(ToolErrorRecovered(include_call=True), ToolErrorRecovered()))


class TestMinConfidence(OfWrappers):
    @pytest.fixture
    def policy(self):
        return MinConfidence(policy=AnyOf(policies=BOTH), at_least=0.5)


class TestCooldown(OfWrappers):
    keeps_proposing = False  # what is stale later can come first in the order of the inner policy

    def test_what_is_retracted_already_may_be_proposed_again(self, policy, thread):
        """A retraction that lies back makes room for the next, so more may be proposed beside its record."""
        proposed = policy.propose(PolicyContext(thread_id="t", messages=thread))
        records = [recorded(retraction, number) for number, retraction in enumerate(proposed)]
        assert policy.propose(PolicyContext(thread_id="t", messages=thread, records=records)) == proposed

    @pytest.fixture
    def policy(self):
        return Cooldown(policy=SupersededToolResult(), most=1, steps=3)

    @pytest.fixture
    def thread(self):
        return calls(("get_item", '{"item_id": 1}', "price 5"), ("get_item", '{"item_id": 1}', "price 6"))
