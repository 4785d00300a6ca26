"""Where records apply when a thread grows, forks, is rewound, pruned, or repeats itself."""

import dataclasses
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_retract.errors import SpanError
from kv_retract.ledger.ledger import applicable, record_for, standing
from kv_retract.types import Guarantee, Message, Retraction, Scope, SpanRef, Status, ToolCall, window_digest


def record(messages, index, **kw):
    fields = {"span": SpanRef(index), "policy": "explicit", "reason": "test", **kw}
    return record_for(
        Retraction(**fields),
        messages,
        thread_id="t",
        eraser_id="mask",
        closes_gap=False,
        shared=False,
        exact=False,
        now="2025-01-01T00:00:00+00:00",
        span_tokens=3,
    )


def texts(n, start=0):
    return [Message("assistant" if i % 2 else "user", f"text {i}") for i in range(start, start + n)]


def indices(records, messages):
    return [r.span.message for r in applicable(records, messages)]


def test_a_record_says_what_was_decided_without_the_text():
    messages = texts(5)
    retraction = Retraction(
        span=SpanRef(2, start=1, end=3),
        policy="p",
        reason="why",
        guarantee=Guarantee.EXACT,
        notice="gone",
        scope=Scope.BRANCH,
    )
    r = record_for(
        retraction,
        messages,
        thread_id="t",
        eraser_id="shift",
        closes_gap=True,
        shared=True,
        exact=True,
        now="now",
        span_tokens=7,
    )
    assert (r.span, r.policy, r.reason, r.guarantee, r.notice) == (
        SpanRef(2, start=1, end=3),
        "p",
        "why",
        Guarantee.EXACT,
        "gone",
    )
    assert (r.status, r.eraser_id, r.closes_gap, r.shared) == (Status.EXACT, "shift", True, True)
    assert (r.created_at, r.span_tokens) == ("now", 7)
    assert (r.scope, r.window_size) == (Scope.BRANCH, 3)
    assert r.window_digest == window_digest([m.digest() for m in messages[2:]])
    assert "text 2" not in str(r.to_json())


def test_the_scope_follows_the_guarantee():
    messages = texts(5)
    assert (record(messages, 1).scope, record(messages, 1).window_size) == (Scope.BRANCH, 4)
    exact = record(messages, 1, guarantee=Guarantee.EXACT)
    assert (exact.scope, exact.window_size) == (Scope.THREAD, 1)
    assert record(messages, 1).status is Status.STEERED


def test_ids_name_the_thread_and_the_place():
    messages = texts(4)
    base = record(messages, 1)
    assert base.retraction_id == record(messages, 1, reason="other", notice="n").retraction_id
    assert len(base.retraction_id) == 16 and int(base.retraction_id, 16) >= 0
    others = [record(messages, 2), record(messages[:3], 1), record(messages, 1, span=SpanRef(1, start=2))]
    others += [record(messages, 1, policy="other"), record(messages, 1, guarantee=Guarantee.EXACT, scope=Scope.BRANCH)]
    assert len({r.retraction_id for r in [base, *others]}) == 6


def test_what_was_undone_and_what_took_its_place_stand_beside_each_other():
    messages = texts(4)
    undone = dataclasses.replace(record(messages, 3, scope=Scope.THREAD), status=Status.REVOKED)
    anew = record(messages, 3, policy="other", scope=Scope.THREAD)
    assert set(standing([undone, anew], messages)) == set(standing([anew, undone], messages)) == {undone, anew}
    assert applicable([undone, anew], messages) == (anew,)


@pytest.mark.parametrize("index", [-1, 4])
def test_a_span_outside_of_the_thread_is_refused(index):
    with pytest.raises(SpanError, match=f"0 to 3, got {index}"):
        record(texts(4), index)


def test_a_thread_that_grows_keeps_its_retractions():
    messages = texts(6)
    assert applicable([record(messages[:4], 1)], messages) == (record(messages[:4], 1),)


def test_a_fork_from_before_sees_what_it_saw_then_unless_the_scope_is_the_thread():
    messages = texts(6)
    branch, everywhere = record(messages, 1), record(messages, 1, scope=Scope.THREAD)
    fork = [*messages[:3], Message("assistant", "another answer"), Message("user", "and more")]
    assert indices([branch], fork) == [] and indices([everywhere], fork) == [1]
    assert indices([branch], messages[:4]) == [], "rewound to before the retraction"
    assert indices([branch], messages) == [1], "and back again"


def test_pruned_messages_move_the_span():
    messages = texts(8)
    records = [record(messages, 3), record(messages[:6], 5)]
    assert indices(records, messages[2:]) == [1, 3]
    assert indices(records, [Message("system", "summary"), *messages]) == [4, 6]
    assert indices(records, messages[4:]) == [1], "the first one's message is gone"


def test_a_changed_message_is_another_message():
    messages = texts(4)
    r = record(messages, 2)
    for change in (
        {"content": "text 3!"},
        {"name": "x"},
        {"tool_calls": (ToolCall("c", "f", "{}"),)},
        {"reasoning": "r"},
    ):
        assert applicable([r], [*messages[:3], dataclasses.replace(messages[3], **change)]) == ()


def test_revoked_records_do_not_apply_but_stand():
    messages = texts(4)
    revoked = dataclasses.replace(record(messages, 2), status=Status.REVOKED)
    assert applicable([revoked], messages) == ()
    assert standing([revoked], messages[1:]) == (dataclasses.replace(revoked, span=SpanRef(1)),)


def test_the_order_is_that_of_the_places():
    calls = (ToolCall("a", "f", "{}"), ToolCall("b", "f", "{}"))
    messages = [*texts(2), Message("assistant", "text", calls)]
    spans = [SpanRef(2, "tool_call", 1), SpanRef(2, "tool_call", 0), SpanRef(2, start=2), SpanRef(2, end=1), SpanRef(0)]
    assert [r.span for r in applicable([record(messages, 2, span=s) for s in spans], messages)] == spans[::-1]


# -- messages that repeat each other -------------------------------------------------------------------------------

OK = Message("user", "ok")


def test_of_equal_messages_the_nearest_is_meant():
    messages = [OK, *texts(3), OK, *texts(3, 3), OK]
    newest = record(messages, 8)
    assert indices([newest], messages) == [8]
    assert indices([newest], [*messages, OK]) == [8], "what is said again later is not retracted"
    assert indices([newest], messages[2:]) == [6]


def test_for_the_whole_thread_every_equal_message_is_meant():
    messages = [OK, *texts(3), OK, *texts(3, 3), OK]
    assert indices([record(messages, 4, scope=Scope.THREAD)], messages) == [0, 4, 8]
    assert indices([record(messages, 4, scope=Scope.THREAD)], messages[1:]) == [3, 7]


def test_equal_messages_are_retracted_each_on_its_own():
    messages = [*texts(2), OK, *texts(3, 2), OK, *texts(1, 9)]
    both = [record(messages, i, scope=Scope.THREAD) for i in (2, 6)]
    assert len({r.retraction_id for r in both}) == 2
    assert indices(both, messages) == [2, 6]
    assert indices(both, messages[2:]) == [0, 4]
    assert indices(both, [*texts(3, 20), *messages]) == [5, 9]


def test_none_of_two_equal_messages_comes_back_when_many_are_pruned():
    messages = [*texts(10), OK, *texts(1, 10), OK]
    both = [record(messages, i, scope=Scope.THREAD) for i in (10, 12)]
    assert indices(both, messages[4:]) == [6, 8]


def test_several_spans_of_one_message_stay_together():
    messages = [OK, *texts(4), OK]
    spans = [SpanRef(5, end=1), SpanRef(5, start=1)]
    records = [record(messages, 5, span=s) for s in spans]
    assert indices(records, messages[1:]) == [4, 4]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.data())
def test_windows_stand_exactly_where_the_digests_say(letters, data):
    """Against a search that hashes every window with `window_digest` itself."""
    messages = [Message("user", letter) for letter in letters]
    r = record(messages, data.draw(st.integers(0, len(messages) - 1)))
    other = [Message("user", letter) for letter in data.draw(st.lists(st.sampled_from("abc"), max_size=14))]
    digests = [m.digest() for m in other]
    starts = [
        i
        for i in range(len(other) - r.window_size + 1)
        if window_digest(digests[i : i + r.window_size]) == r.window_digest
    ]
    want = [min(starts, key=lambda i: (abs(i - r.span.message), i))] if starts else []
    assert indices([r], other) == want


def test_a_long_thread_with_many_retractions_is_quick():
    messages = texts(600)
    records = [record(messages[: i + 3], i) for i in range(0, 500, 5)]
    for thread in (messages, messages[20:], [*messages[:-1], OK]):
        began = time.perf_counter()
        assert len(applicable(records, thread)) >= 95
        assert time.perf_counter() - began < 2
